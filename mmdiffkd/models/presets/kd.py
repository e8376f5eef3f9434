from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import LOGITS_NEED, Preset


@PRESETS.register_module(name='kd')
class KDPreset(Preset):
    """KD: KL divergence between class probabilities; see :class:`.KLDivergence`.

    For classifiers, the probabilities are compared for each image. For segmentors, they are compared for each pixel of
    the logit map.

    Weights:
        Classifiers use weight 5 at temperature 1, as in mmrazor's configs for ImageNet. Segmentors use weight 1 at
        temperature 1, because no weight has been published for them.
    """

    summary = 'KD: KL divergence between class probabilities'
    paper = 'Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531'
    released_code = 'the released code of DiffKD'
    needs = LOGITS_NEED
    weights = dict(segmentation=1.0, classification=5.0)
    distance = dict(type='mmdiffkd.KLDivergence')
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of logits. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.logit_pair(student, student_cfg, teacher_cfg, denoise=False, align=False)
