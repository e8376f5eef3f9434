"""The preset ``ld``: localization distillation."""

from mmdiffkd.registry import PRESETS

from .dense_head import DenseHeadPreset


@PRESETS.register_module(name='ld')
class LDPreset(DenseHeadPreset):
    """Localization distillation of GFL heads; see :class:`.LDNeck`.

    - Taps: the last layers of the class and box branches of both heads. Only boxes are distilled.
    - Weights: 0.25 with the temperature 10, as in mmdet's configs.
    - Needs: GFL heads with equal strides and ``reg_max`` in both models, and ground truth. The classes may differ.
    """

    summary = 'LD: KL divergence of the box distributions of GFL heads at positive locations'
    paper = 'Zheng et al., Localization Distillation for Dense Object Detection, CVPR 2022, arXiv 2102.12252'
    needs = 'GFL heads with equal strides and reg_max'
    pair_name = 'ld'
    neck_defaults = dict(type='mmdiffkd.LDNeck')

    def check_heads(self, heads, cfgs) -> None:
        """Check strides and bins; see :meth:`.DenseHeadPreset.check_heads`."""
        self.check_distributions(heads, cfgs)
        super().check_heads(heads, cfgs)
