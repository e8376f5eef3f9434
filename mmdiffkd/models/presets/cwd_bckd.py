"""The preset ``cwd_bckd``: channel-wise distillation of feature maps, and BCKD of the heads."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .bckd import BCKDPreset
from .cwd_head import CWDHeadPreset


@PRESETS.register_module(name='cwd_bckd')
class CWDBCKDPreset(BCKDPreset):
    """Distills feature maps by CWD and heads by BCKD (detectors only).

    :class:`.ChannelWiseDivergence` compares the feature maps, and :class:`.BCKDNeck` compares the outputs of the heads.
    The neck of the heads repeats the label assignment of the student's head, which takes a little time.

    Weights:
        3 for the feature maps, as in ``cwd_head``; 1 for the scores and 4 for the boxes, as in ``bckd``.

    Released code:
        There is no released code for this combination. The losses are those of ``cwd`` and ``bckd``.
    """

    summary = 'CWD of the feature maps of detectors, and BCKD of their heads'
    paper = f'{CWDHeadPreset.paper}; {BCKDPreset.paper}'
    released_code = ''
    weights = CWDHeadPreset.weights
    distance = CWDHeadPreset.distance

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pairs ``fpn`` and ``bckd``. Arguments: see :meth:`.Preset.default_pairs`."""
        heads = self.head_pair(student, student_cfg, teacher_cfg)
        features = self.feature_pair(student_cfg, teacher_cfg, type='mmdiffkd.FeatureDiffusionNeck', denoise=False)
        return {**features, **heads}
