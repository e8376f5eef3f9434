"""The preset ``ld``: localization distillation."""

from mmdiffkd.registry import PRESETS

from .dense_head_preset import DenseHeadPreset


@PRESETS.register_module(name='ld')
class LDPreset(DenseHeadPreset):
    """LD (localization distillation): KL divergence between distributions of box sides; see :class:`.LDNeck`.

    GFL heads predict a distribution for each side of a box. The distributions of student and teacher are compared at
    positive locations. Class scores are not distilled, so the two models may have different classes. The neck repeats
    the label assignment of the student's head, which takes a little time.

    Weights:
        The weight is 0.25 at temperature 10, as in the configs of mmdet.

    Released code:
        In the released code, the divergence is a mean over the bins. The loss is a sum over the locations that is not
        divided by their number, unlike the other box losses of the head. This preset does the same.
    """

    summary = 'LD: KL divergence of the box distributions of GFL heads at positive locations'
    paper = 'Zheng et al., Localization Distillation for Dense Object Detection, CVPR 2022, arXiv 2102.12252'
    released_code = 'mmdet (3.5.1 of onedl-mmdetection)'
    needs = 'GFL heads with equal strides and reg_max'
    pair_name = 'ld'
    neck_defaults = dict(type='mmdiffkd.LDNeck')

    def check_heads(self, heads, cfgs) -> None:
        """Check the strides and the number of bins; see :meth:`.DenseHeadPreset.check_heads`."""
        self.check_distributions(heads, cfgs)
        super().check_heads(heads, cfgs)
