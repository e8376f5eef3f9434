from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='fitnet')
class FitNetPreset(Preset):
    """FitNet: mean squared error between features, after a 1x1 convolution on the features of the student.

    The convolution maps the channels of the student to those of the teacher. Detectors distill all outputs of the neck.
    All other models distill the last feature map of the backbone.

    Weights:
        Detectors and segmentors use 5, DiffKD's weight for the same distance on detectors, because no weight has been
        published for FitNet on these tasks. Classifiers use 100, as in mdistiller and RepDistiller.

    Released code:
        This preset was not compared with released code. The loss is the mean squared error of torch, multiplied by its
        weight.
    """

    summary = 'FitNet: mean squared error between features'
    paper = 'Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv 1412.6550'
    weights = dict(detection=5.0, segmentation=5.0, classification=100.0)
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False)
