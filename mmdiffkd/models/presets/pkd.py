from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset, find_task


@PRESETS.register_module(name='pkd')
class PKDPreset(Preset):
    """PKD: mean squared error between standardized features, so their scale has no effect; see :class:`.PKDLoss`.

    Each channel is standardized over batch and positions. A 1x1 convolution maps the student's channels to those of the
    teacher. The authors' models have equal channels, and the authors use no convolution. Segmentors distill the last
    two feature maps of the backbone.

    Weights:
        Detectors use 6, as in mmrazor's configs. Segmentors and classifiers use the same weight, because no weight has
        been published for them.

    Released code:
        This preset was not compared with released code. The loss is half the mean squared error of the standardized
        features.
    """

    summary = 'PKD: correlation between features, independent of their scale'
    paper = 'Cao et al., PKD: General Distillation Framework for Object Detectors, NeurIPS 2022, arXiv 2207.02039'
    weights = dict(detection=6.0, segmentation=6.0, classification=6.0)
    distance = dict(type='mmdiffkd.PKDLoss')
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        levels = (-2, -1) if find_task(student_cfg) == 'segmentation' else (-1,)
        return self.feature_pair(student_cfg, teacher_cfg, levels, denoise=False)
