from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import LOGITS_NEED, Preset


@PRESETS.register_module(name='dist')
class DISTPreset(Preset):
    """DIST: correlation between class probabilities, over classes and over samples; see :class:`.DISTLoss`.

    DIST correlates the probabilities of student and teacher over the classes of each sample, and over the samples of
    each class. For classifiers, a sample is an image. For segmentors, a sample is a pixel of the logit map.

    Weights:
        Segmentors use 1, as in the DiffKD paper. Classifiers use 2, as in mmrazor's config.
    """

    summary = 'DIST: correlation between class probabilities'
    paper = 'Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536'
    released_code = 'the released code of DiffKD'
    needs = LOGITS_NEED
    weights = dict(segmentation=1.0, classification=2.0)
    distance = dict(type='mmdiffkd.DISTLoss')
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of logits. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.logit_pair(student, student_cfg, teacher_cfg, denoise=False, align=False)
