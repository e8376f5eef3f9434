from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='cosine')
class CosinePreset(Preset):
    """Cosine distance between the features of each position, after a 1x1 convolution on the student's features.

    The default for teachers of timm, torchvision and transformers: the scale of their features differs by channel and
    position, for example in the outliers of a ViT, which dominate a squared error.

    - Detectors: all outputs of the neck. Other models: the last feature map.
    - Weights: there is no published weight beside the loss of a task. 6 is PKD's weight for detectors, whose loss has
      the same range, from 0 to 2.
    """

    summary = 'cosine: direction of the features at each position, for foundation models'
    paper = 'Ranzinger et al., AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024, arXiv 2312.06709'
    weights = dict(detection=6.0, segmentation=6.0, classification=6.0)
    distance = dict(type='mmdiffkd.CosineLoss')
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False)
