"""The preset ``fgd``: focal and global distillation."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS

from .base import Preset, short_type

# tau and the weights of foreground, background, attention and relation in the released configs
TWO_STAGE = dict(tau=0.5, foreground_weight=5e-5, background_weight=2.5e-5, attention_weight=5e-5, relation_weight=5e-7)
FCOS = dict(tau=0.8, foreground_weight=1.6e-3, background_weight=8e-4, attention_weight=8e-4, relation_weight=8e-6)


@PRESETS.register_module(name='fgd')
class FGDPreset(Preset):
    """FGD (focal and global distillation): features inside and outside of boxes, and relations; see :class:`.FGDNeck`.

    The focal loss compares feature maps separately inside and outside of the ground-truth boxes, weighted by the
    attention of the teacher. It also compares the attention of both models. The global loss compares the relations
    between positions.

    Weights:
        The weights are those of the released configs. Models with an RoI head use the weights for Faster R-CNN, FCOS
        uses its own, and all other models use the weights for RetinaNet. The losses are sums over a feature map, so the
        weights suit 256 channels and the usual image size of COCO.

    Released code:
        The released code scales boxes by the size of the image without padding, which shifts the boxes of padded
        images. By default, this preset uses the size with padding. Boxes that extend beyond the feature map are cut at
        its border, but their weight is still 1 / area of the uncut box, as in the released code.

    Examples:
        To scale boxes as the released code does::

            _base_ = './my_diffkd_config.py'
            model = dict(preset='fgd', distill=dict(fpn=dict(neck=dict(padded_boxes=False))))
    """

    summary = 'FGD: features inside and outside of boxes, attention maps, and relations between positions'
    paper = 'Yang et al., Focal and Global Knowledge Distillation for Detectors, CVPR 2022, arXiv 2111.11837'
    released_code = 'yzd-v/FGD (c03a6cf)'
    needs = 'detectors, and images with boxes'
    weights = dict(detection=1.0)
    neck_defaults = dict(type='mmdiffkd.FGDNeck')

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair ``fpn``. Arguments: see :meth:`.Preset.default_pairs`."""
        self.check_task(student_cfg)
        if student_cfg.get('detector'):
            raise self.refusal(
                f'needs images with boxes, but {short_type(student_cfg)} trains a detector on views or frames; choose '
                "another preset, such as 'fitnet'."
            )
        weights = {}
        if student_cfg.get('roi_head'):
            weights = TWO_STAGE
        elif short_type(student_cfg) == 'FCOS':
            weights = FCOS
        return self.feature_pair(student_cfg, teacher_cfg, **self.neck_defaults, **weights)
