from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='fbkd')
class FBKDPreset(Preset):
    """FBKD: features weighted by attention, means over channels and positions, and relations; see :class:`.FBKDNeck`.

    Each level of the neck has four terms: features weighted by the spatial attention of both models, means over
    positions, means over channels, and the outputs of a non-local block of each model. Both non-local blocks are
    trained.

    Weights:
        Those of the authors for the four terms, which mmrazor uses as well.

    Released code:
        The terms are norms over the whole batch, so they are not divided by the number of images. The authors'
        attention over channels has no effect, and keys and values of the non-local blocks are pooled twice. This preset
        does the same.

    Examples:
        To halve all four terms::

            _base_ = './my_diffkd_config.py'
            model = dict(preset='fbkd', distill=dict(fpn=dict(neck=dict(loss_weight=0.5))))
    """

    summary = 'FBKD: attention-guided features and non-local relations of detectors'
    paper = 'Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021'
    released_code = 'mmrazor (90c7af1)'
    needs = 'necks in both detectors'
    weights = dict(detection=1.0)
    neck_defaults = dict(type='mmdiffkd.FBKDNeck')

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, type='mmdiffkd.FBKDNeck')
