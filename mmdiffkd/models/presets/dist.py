from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import LOGITS_NEED, Preset


@PRESETS.register_module(name='dist')
class DISTPreset(Preset):
    """DIST: correlation of class probabilities, over the classes of a sample and over the samples of a class.

    - Segmentors: the logits at the head's resolution. Classifiers: the logits.
    - Weights: 1 for segmentors is the weight of the DiffKD paper. 2 for classifiers is the weight of mmrazor's config.
    """

    summary = 'DIST: correlation between class probabilities'
    paper = 'Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536'
    needs = LOGITS_NEED
    weights = dict(segmentation=1.0, classification=2.0)
    distance = dict(type='mmdiffkd.DISTLoss')
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of logits. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.logit_pair(student, student_cfg, teacher_cfg, denoise=False, align=False)
