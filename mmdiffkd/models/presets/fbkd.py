from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset


@PRESETS.register_module(name='fbkd')
class FBKDPreset(Preset):
    """FBKD: compare attention-weighted features, feature means and non-local relations; see :class:`.FBKDNeck`.

    On each level of the neck, four terms compare student and teacher: the features, weighted by the spatial attention
    of both models; the means over the positions; the means over the channels; and the outputs of two non-local blocks,
    one on the features of each model. Both blocks are trained.

    Weights:
        The weights of the four terms are those of the authors. mmrazor uses the same weights.

    Released code:
        In the released code, each term is a norm over the whole batch, so it is not divided by the number of images.
        The channel attention has no effect. The keys and values of the non-local blocks are pooled twice. This preset
        gives the same losses.

    Examples:
        To halve the weights of all four terms::

            _base_ = './my_diffkd_config.py'
            model = dict(preset='fbkd', distill=dict(fpn=dict(neck=dict(loss_weight=0.5))))
    """

    summary = 'FBKD: attention-guided features and non-local relations of detectors'
    paper = 'Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021'
    released_code = 'mmrazor (90c7af1)'
    needs = 'necks in both detectors'
    weights = dict(detection=1.0)
    neck_defaults = dict(type='mmdiffkd.FBKDNeck')

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of features. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.feature_pair(student_cfg, teacher_cfg, type='mmdiffkd.FBKDNeck')
