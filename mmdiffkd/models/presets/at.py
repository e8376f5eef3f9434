from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import FEATURES_NEED, Preset


@PRESETS.register_module(name='at')
class ATPreset(Preset):
    """AT (attention transfer): mean squared error between normalized maps of the mean squared activation.

    The map of an image is the mean of the squared features over the channels, divided by its L2 norm. Student and
    teacher may have different channels, and nothing but the student is trained.

    Weights:
        1000 is the weight of the authors and of mdistiller for classifiers. 250 is the weight per stage in the only
        config of mmrazor with this loss. There is no published weight for detectors and segmentors.
    """

    summary = 'AT: mean squared error between maps of activation strength'
    paper = 'Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928'
    released_code = 'mmrazor (90c7af1)'
    needs = f'{FEATURES_NEED}; maps, not vectors'
    weights = dict(detection=250.0, segmentation=250.0, classification=1000.0)
    distance = dict(type='mmdiffkd.ATLoss')
    neck_defaults = dict(denoise=False, align=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False, align=False)
