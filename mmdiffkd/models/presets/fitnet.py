from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='fitnet')
class FitNetPreset(Preset):
    """FitNet: mean squared error between features, after a 1x1 convolution on the features of the student.

    The convolution maps the channels of the student to those of the teacher. Detectors distill all outputs of the neck,
    other models the last feature map of the backbone.

    Weights:
        5 is DiffKD's weight of the same distance for detectors, because FitNet has no published weight for detectors
        and segmentors. 100 is the weight of mdistiller and RepDistiller for classifiers.

    Released code:
        It was not compared. The loss is the mean squared error of torch, multiplied by its weight.
    """

    summary = 'FitNet: mean squared error between features'
    paper = 'Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv 1412.6550'
    weights = dict(detection=5.0, segmentation=5.0, classification=100.0)
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False)
