from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, check_arguments

from .base import DistillContext, DistillNeck, DistillOutput
from .dense_heads import EPS, as_rows, assign_labels, decode_boxes, giou, head_of, regression_rows
from .ld_neck import check_two_taps


@MODELS.register_module()
class BCKDNeck(DistillNeck):
    """Binary-classification distillation of dense heads with sigmoid scores (Yang et al., ICCV 2023).

    The class loss is the binary cross-entropy between the scores of student and teacher, weighted by the absolute
    difference of the scores. The gradient also flows through this weight. The box loss is 1 - GIoU between the boxes of
    student and teacher at all locations. Its weight at a location is the largest score difference of any class, without
    gradient. Both losses are divided by the number of positive locations. As in the released code, the losses of a
    level without positive locations are 0.

    The released code is for GFL. This class also supports ATSS, RetinaNet and FCOS, and decodes the boxes from the
    deltas or distances that their heads predict.

    The taps are the last layers of the class branch and the box branch, in this order: ``student=['bbox_head.gfl_cls',
    'bbox_head.gfl_reg']``, and the same for the teacher. The neck repeats the label assignment of the student's head.

    Args:
        student_channels (list[list[int]]): Student channels per tap and level.
        teacher_channels (list[list[int]]): Teacher channels per tap and level.
        beta (float): Exponent of the score difference. Defaults to 1.
        cls_weight (float): Weight of the class loss. Defaults to 1.
        loc_weight (float): Weight of the box loss. Defaults to 4.

    Raises:
        ValueError: If an argument is invalid.
        ValueError: If the pair does not have two taps, or the class layers have different numbers of channels.
    """

    @check_arguments
    def __init__(
        self,
        student_channels: Sequence[Any],
        teacher_channels: Sequence[Any],
        beta: NonNegative = 1.0,
        cls_weight: NonNegative = 1.0,
        loc_weight: NonNegative = 4.0,
    ):
        super().__init__()
        check_two_taps(self, student_channels)
        (ours, *_), (theirs, *_) = student_channels[0], teacher_channels[0]
        if ours != theirs:
            raise ValueError(
                'BCKDNeck compares the scores class by class, but the class layers of student and teacher have '
                f'{ours} and {theirs} channels.'
            )
        self.beta = beta
        self.cls_weight = cls_weight
        self.loc_weight = loc_weight

    def forward(
        self, student: List[List[Tensor]], teacher: List[List[Tensor]], context: DistillContext
    ) -> List[DistillOutput]:
        """Compare scores and boxes.

        Args:
            student (list[list[Tensor]]): Outputs of the class layer, (N, A * K, H, W) per level, and of the box layer,
                (N, A * C, H, W) per level, with A anchors per position, K classes and C numbers per box.
            teacher (list[list[Tensor]]): The outputs of the same layers of the teacher.
            context (DistillContext): Needs both models and ``data_samples`` with ground truth.

        Returns:
            list[DistillOutput]: ``loss_cls`` and ``loss_loc`` per level.

        Raises:
            ValueError: If a model has no ``bbox_head``, there are no data samples, or not all levels are distilled.
        """
        heads = {owner: head_of(self, owner, context, len(student[0])) for owner in ('student', 'teacher')}
        positives, label_weights, count = assign_labels(heads['student'], student[0], context.data_samples)
        predictions = [
            predict(heads[owner], *features) for owner, features in (('student', student), ('teacher', teacher))
        ]
        outputs = []
        for ours, theirs, is_positive, weights in zip(*predictions, positives, label_weights):
            losses = balanced_losses(*ours, *theirs, is_positive, weights, count, self.beta)
            outputs.append(
                DistillOutput(dict(loss_cls=self.cls_weight * losses.cls, loss_loc=self.loc_weight * losses.loc))
            )
        return outputs

    def describe(self) -> List[dict]:
        """Return the settings; see :meth:`DistillNeck.describe`."""
        weights = dict(cls_weight=self.cls_weight, loc_weight=self.loc_weight)
        return [dict(neck=type(self).__name__, loss_kd='BCKD', **weights)]


class BCKDLosses(NamedTuple):
    """Losses of one level without their weights."""

    cls: Tensor
    loc: Tensor


def predict(head, scores: Sequence[Tensor], outputs: Sequence[Tensor]) -> List[Tuple[Tensor, Tensor]]:
    """Return class logits, (R, K), and boxes, (R, 4), of each level, one row per prior (anchor or point)."""
    all_priors = head.prior_generator.grid_priors([level.shape[-2:] for level in scores], device=scores[0].device)
    predictions = []
    for level, (maps, output, priors) in enumerate(zip(scores, outputs, all_priors)):
        boxes = decode_boxes(head, level, regression_rows(head, level, output), priors)
        predictions.append((as_rows(maps, head.num_classes), boxes))
    return predictions


def balanced_losses(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    positives: Tensor,
    label_weights: Tensor,
    avg_factor: Tensor,
    beta: float = 1.0,
) -> BCKDLosses:
    """Compare the predictions of one level.

    Args:
        student_logits (Tensor): Class logits, (R, K).
        student_boxes (Tensor): Boxes, (R, 4).
        teacher_logits (Tensor): Class logits, (R, K).
        teacher_boxes (Tensor): Boxes, (R, 4).
        positives (Tensor): Whether a location is positive, (R, ) of type bool.
        label_weights (Tensor): 0 for ignored locations, (R, ).
        avg_factor (Tensor): Number of positive locations of all levels.
        beta (float): Exponent of the score difference. Defaults to 1.

    Returns:
        BCKDLosses: Scalars; 0 if no location is positive.
    """
    factor = positives.any() / (avg_factor + EPS)
    cls = score_divergence(student_logits, teacher_logits, beta) * label_weights
    loc = (1 - giou(student_boxes, teacher_boxes.detach())) * loc_weights(student_logits, teacher_logits, label_weights)
    return BCKDLosses(cls.sum() * factor, loc.sum() * factor)


def score_divergence(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Return the binary cross-entropy of scores, weighted by their difference and summed over classes.

    The weight is the absolute difference of the scores to the power ``beta``.

    Args:
        student (Tensor): Logits, (R, K).
        teacher (Tensor): Logits, (R, K).
        beta (float): Exponent of the difference. Defaults to 1.

    Returns:
        Tensor: One value per row, (R, ).
    """
    target = teacher.detach().sigmoid()
    # clamped, because the gradient of x ** beta at 0 is infinite if beta is less than 1
    weight = (target - student.sigmoid()).abs().clamp(min=1e-12) ** beta
    return (F.binary_cross_entropy_with_logits(student, target, reduction='none') * weight).sum(dim=1)


@torch.no_grad()
def loc_weights(student: Tensor, teacher: Tensor, label_weights: Tensor) -> Tensor:
    """Return the largest score difference of each row of logits, (R, K), times the label weight, (R, )."""
    return (teacher.sigmoid() - student.sigmoid()).abs().amax(dim=1) * label_weights
