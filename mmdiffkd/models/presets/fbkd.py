from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='fbkd')
class FBKDPreset(Preset):
    """FBKD: features weighted by attention, means over channels and positions, and relations; see :class:`.FBKDNeck`.

    - Detectors: all outputs of the neck.
    - Weights: those of the authors and of mmrazor for the four terms; the weight in the table is their common factor.
    """

    summary = 'FBKD: attention-guided features and non-local relations of detectors'
    paper = 'Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021'
    needs = 'necks in both detectors'
    weights = dict(detection=1.0)
    neck_defaults = dict(type='mmdiffkd.FBKDNeck')

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, type='mmdiffkd.FBKDNeck')
