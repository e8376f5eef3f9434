from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import FEATURES_NEED, Preset


@PRESETS.register_module(name='at')
class ATPreset(Preset):
    """AT (attention transfer): mean squared error between normalized attention maps; see :class:`.ATLoss`.

    The attention map of an image is the mean of the squared features over the channels, divided by its L2 norm. Student
    and teacher may have different numbers of channels. The method adds no trainable layers.

    Weights:
        Classifiers use 1000, as the authors and mdistiller do. Detectors and segmentors use 250, because no weight has
        been published for them: 250 is the weight per stage in the only config of mmrazor with this loss.
    """

    summary = 'AT: mean squared error between attention maps'
    paper = 'Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928'
    released_code = 'mmrazor (90c7af1)'
    needs = f'{FEATURES_NEED} that gives feature maps, not vectors'
    weights = dict(detection=250.0, segmentation=250.0, classification=1000.0)
    distance = dict(type='mmdiffkd.ATLoss')
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False, align=False)
