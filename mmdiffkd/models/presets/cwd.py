from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset, find_task

LOGIT_TAU = 4.0  # temperature of the authors for the logits of segmentors


@PRESETS.register_module(name='cwd')
class CWDPreset(Preset):
    """CWD: KL divergence between softmaxes over the positions of each channel; see :class:`.ChannelWiseDivergence`.

    CWD compares the positions at which each channel is active. Detectors distill the outputs of the neck. Segmentors
    distill the logits, as in the main results of the paper. All other models distill the last feature map of the
    backbone.

    Weights:
        Detectors use weight 10 at temperature 1, as mmrazor's configs do for the FPN. Classifiers use the same values,
        because no weight has been published for them. Segmentors use weight 3 at temperature 4 for the logits, as the
        authors do.

    Examples:
        To distill fewer levels with a different weight::

            _base_ = './my_diffkd_config.py'
            fpn = dict(levels=[0, 1, 2], neck=dict(loss_kd=dict(loss_weight=3.0)))
            model = dict(preset='cwd', distill=dict(fpn=fpn))
    """

    summary = 'CWD: spatial distribution of each channel, of logits for segmentors and of features otherwise'
    paper = 'Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv 2011.13256'
    released_code = 'mmrazor (90c7af1)'
    needs = 'detectors: necks; segmentors: shared classes; classifiers: backbones that give feature maps, not vectors'
    weights = dict(detection=10.0, segmentation=3.0, classification=10.0)
    distance = dict(type='mmdiffkd.ChannelWiseDivergence')
    neck_defaults = dict(denoise=False)

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of logits or features. Arguments: see :meth:`.Preset.default_pairs`."""
        if find_task(student_cfg) == 'segmentation':
            return self.logit_pair(student, student_cfg, teacher_cfg, denoise=False, align=False)
        return self.feature_pair(student_cfg, teacher_cfg, denoise=False)

    def default_distance(self, student_cfg: dict) -> dict:
        """Return the config of the distance for pairs that do not set ``loss_kd``."""
        distance = super().default_distance(student_cfg)
        return dict(distance, tau=LOGIT_TAU) if find_task(student_cfg) == 'segmentation' else distance
