from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import FEATURES_NEED, Preset


@PRESETS.register_module(name='cwd_norm')
class CWDNormPreset(Preset):
    """CWD between features whose channels are standardized first, as in the distillation configs of RTMDet.

    A 1x1 convolution maps the student's channels to those of the teacher. Then the channels of both models are
    standardized over batch and positions, and compared by :class:`.ChannelWiseDivergence`.

    Weights:
        The weight is 1 at temperature 1, as in RTMDet's distillation configs in mmyolo. No weight has been published
        for segmentors and classifiers; they use the same values.

    Released code:
        RTMDet's configs standardize features with a BatchNorm that has no affine parameters and uses the statistics of
        the batch in evaluation mode, too. This preset does the same. RTMDet's configs stop the distillation after 280
        of 300 epochs. By default, this preset distills until the end of the training.

    Examples:
        To stop the distillation after 280 epochs, as RTMDet's configs do::

            _base_ = './my_diffkd_config.py'
            model = dict(preset='cwd_norm')
            custom_hooks = [dict(type='mmdiffkd.DistillScheduleHook', end=280)]
    """

    summary = 'CWD of standardized features, as in the distillation of RTMDet'
    paper = 'Shu et al., ICCV 2021, arXiv 2011.13256; Lyu et al., RTMDet, 2022, arXiv 2212.07784'
    released_code = 'mmrazor (90c7af1) with the settings of mmyolo (8c4d9dc)'
    needs = f'{FEATURES_NEED} that gives feature maps, not vectors'
    weights = dict(detection=1.0, segmentation=1.0, classification=1.0)
    distance = dict(type='mmdiffkd.ChannelWiseDivergence', normalize=True)
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False)
