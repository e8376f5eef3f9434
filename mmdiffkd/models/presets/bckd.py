"""The preset ``bckd``: binary-classification distillation of dense heads."""

from mmdiffkd.registry import PRESETS

from .dense_head_preset import DenseHeadPreset


@PRESETS.register_module(name='bckd')
class BCKDPreset(DenseHeadPreset):
    """BCKD: binary cross-entropy between the scores of two dense heads, and 1 - GIoU of their boxes.

    :class:`.BCKDNeck` compares all locations of both heads. The absolute difference of the scores weights the
    cross-entropy. The largest score difference at a location weights the GIoU loss. The neck repeats the label
    assignment of the student's head, which takes a little time. If both heads have one anchor or point per location,
    the heads may be of different types. Heads with several anchors per location must have equal anchors.

    Weights:
        1 for the scores and 4 for the boxes, as in the released code for GFL. The released code supports no other head.
        For ATSS, RetinaNet and FCOS, this preset compares the decoded boxes, with the same weights.

    Released code:
        The released code has settings without effect: a temperature, a threshold, and a loss term for non-positive
        locations that is multiplied by 0. This preset leaves them out. As in the released code, the losses of a level
        without positive locations are 0. The gradient also flows through the score difference that weights the
        cross-entropy, as in the released code.
    """

    summary = 'BCKD: binary cross-entropy of scores, weighted by their difference, and GIoU of boxes'
    paper = (
        'Yang et al., Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection, '
        'ICCV 2023, arXiv 2308.14286'
    )
    released_code = 'TinyTigerPan/BCKD (121c9aa)'
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
