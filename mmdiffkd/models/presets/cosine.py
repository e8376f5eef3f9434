from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='cosine')
class CosinePreset(Preset):
    """Cosine distance between the features of student and teacher at each position; see :class:`.CosineLoss`.

    The scale of the features has no effect. A 1x1 convolution maps the student's channels to those of the teacher. The
    preset is the default for teachers from timm, torchvision and transformers, whose features have outliers that
    dominate a squared error.

    Weights:
        The weight is 1, so the loss of a level is between 0 and 2. No weight has been published for use together with
        the loss of a task.

    Released code:
        This preset was not compared with released code. AM-RADIO adds a smooth L1 loss with a ninth of the weight of
        the cosine loss. This preset leaves it out.
    """

    summary = 'cosine: direction of the features at each position, for foundation models'
    paper = 'Ranzinger et al., AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024, arXiv 2312.06709'
    weights = dict(detection=1.0, segmentation=1.0, classification=1.0)
    distance = dict(type='mmdiffkd.CosineLoss')
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False)
