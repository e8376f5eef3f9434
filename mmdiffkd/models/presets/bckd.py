"""The preset ``bckd``: binary-classification distillation of dense heads."""

from mmdiffkd.registry import PRESETS

from .dense_head import DenseHeadPreset


@PRESETS.register_module(name='bckd')
class BCKDPreset(DenseHeadPreset):
    """Binary-classification distillation of dense heads; see :class:`.BCKDNeck`.

    - Taps: the last layers of the class and box branches of both heads.
    - Weights: 1 for the scores and 4 for the boxes, as in the released code for GFL. ATSS, RetinaNet and FCOS heads are
      an extension with the same weights.
    - Needs: GFL, ATSS, RetinaNet or FCOS heads with the same classes and strides in both models, and ground truth. The
      type of head may differ if both have one prior per location; several anchors must be equal.
    """

    summary = 'BCKD: binary cross-entropy of scores, weighted by their difference, and GIoU of boxes'
    paper = (
        'Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, '
        'ICCV 2023, arXiv 2308.14286'
    )
    needs = 'GFL, ATSS, RetinaNet or FCOS heads with the same classes and strides'
    pair_name = 'bckd'
    neck_defaults = dict(type='mmdiffkd.BCKDNeck')

    def check_heads(self, heads, cfgs) -> None:
        """Check strides, classes and anchors; see :meth:`.DenseHeadPreset.check_heads`."""
        super().check_heads(heads, cfgs)
        self.check_equal('numbers of classes', [head.num_classes for head in heads])
        counts = [priors_per_location(head) for head in heads]
        self.check_equal('numbers of anchors per location', counts)
        if counts[0] > 1:
            self.check_equal('anchors', [cfg['bbox_head'].get('anchor_generator') for cfg in cfgs])


def priors_per_location(head) -> int:
    """Return the number of anchors or points per location."""
    return head.prior_generator.num_base_priors[0]
