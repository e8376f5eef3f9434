"""The preset ``cwd_bckd``: channel-wise distillation of feature maps, and BCKD of the heads."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .bckd import BCKDPreset
from .cwd_head import CWDHeadPreset


@PRESETS.register_module(name='cwd_bckd')
class CWDBCKDPreset(BCKDPreset):
    """Channel-wise distillation of feature maps as in ``cwd_head``, and the heads as in ``bckd``.

    - Taps: the outputs of the necks, and the last layers of the class and box branches of both heads.
    - Weights: 3 for the feature maps, 1 for the scores and 4 for the boxes.
    - Needs: what :class:`BCKDPreset` needs.
    """

    summary = 'CWD of the feature maps of detectors, and BCKD of their heads'
    paper = f'{CWDHeadPreset.paper}; {BCKDPreset.paper}'
    weights = CWDHeadPreset.weights
    distance = CWDHeadPreset.distance

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pairs ``fpn`` and ``bckd``. Arguments: see :meth:`.Preset.default_pairs`."""
        heads = self.head_pair(student, student_cfg, teacher_cfg)
        features = self.feature_pair(student_cfg, teacher_cfg, type='mmdiffkd.FeatureDiffusionNeck', denoise=False)
        return {**features, **heads}
