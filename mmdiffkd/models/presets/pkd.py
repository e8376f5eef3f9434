from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset, find_task


@PRESETS.register_module(name='pkd')
class PKDPreset(Preset):
    """PKD: mean squared error between features whose channels are standardized, so their scale has no effect.

    - Detectors: all outputs of the neck. Segmentors: the last two feature maps of the backbone. Other models: the last
      feature map. A 1x1 convolution maps the student's channels; the authors use equal channels and no convolution.
    - Weights: 6 is the weight of mmrazor's configs for detectors; there is no published weight for other tasks.
    """

    summary = 'PKD: correlation between features, which ignores their scale'
    paper = 'Cao et al., PKD: General Distillation Framework for Object Detectors, NeurIPS 2022, arXiv 2207.02039'
    weights = dict(detection=6.0, segmentation=6.0, classification=6.0)
    distance = dict(type='mmdiffkd.PKDLoss')
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        levels = (-2, -1) if find_task(student_cfg) == 'segmentation' else (-1,)
        return self.feature_pair(student_cfg, teacher_cfg, levels, denoise=False)
