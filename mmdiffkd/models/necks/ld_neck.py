from typing import Any, List, Sequence

import torch.nn.functional as F
from torch import Tensor

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from .base import DistillContext, DistillNeck, DistillOutput
from .dense_heads import EPS, as_rows, assign_labels, head_of, regression_rows


@MODELS.register_module()
class LDNeck(DistillNeck):
    """Localization distillation for heads that predict distributions of box sides (Zheng et al., CVPR 2022).

    GFL has such heads. The loss is the KL divergence between the distributions of both models at positive locations. At
    each location, its weight is the student's highest class score, without gradient. As in mmdet, the divergence is a
    mean over the bins, and the loss is a sum over the locations that is not divided by their number. Class scores are
    not distilled.

    The taps are the last layers of the class branch and the box branch, in this order: ``student=['bbox_head.gfl_cls',
    'bbox_head.gfl_reg']``, and the same for the teacher. The neck repeats the label assignment of the student's head.

    Args:
        student_channels (list[list[int]]): Student channels per tap and level.
        teacher_channels (list[list[int]]): Teacher channels per tap and level.
        tau (float): Temperature of the distributions. Defaults to 10.
        loss_weight (float): Weight of the loss. Defaults to 0.25.

    Raises:
        ValueError: If an argument is invalid.
        ValueError: If the pair does not have two taps, or the heads have different numbers of bins.
    """

    @check_arguments
    def __init__(
        self,
        student_channels: Sequence[Any],
        teacher_channels: Sequence[Any],
        tau: Positive = 10.0,
        loss_weight: NonNegative = 0.25,
    ):
        super().__init__()
        check_two_taps(self, student_channels)
        (ours, *_), (theirs, *_) = student_channels[1], teacher_channels[1]
        if ours != theirs:
            raise ValueError(
                'LDNeck compares distributions with the same number of bins, but the box layers of student and teacher '
                f'have {ours} and {theirs} channels.'
            )
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(
        self, student: List[List[Tensor]], teacher: List[List[Tensor]], context: DistillContext
    ) -> List[DistillOutput]:
        """Compare distributions of box sides.

        Args:
            student (list[list[Tensor]]): Outputs of the class layer, (N, K, H, W) per level, and of the box layer,
                (N, 4 * bins, H, W) per level.
            teacher (list[list[Tensor]]): The outputs of the same layers of the teacher.
            context (DistillContext): Needs both models and ``data_samples`` with ground truth.

        Returns:
            list[DistillOutput]: ``loss_ld`` per level.

        Raises:
            ValueError: If the context has no head or no data samples, or if not all levels are distilled.
        """
        heads = {owner: head_of(self, owner, context, len(student[0])) for owner in ('student', 'teacher')}
        positives, _, _ = assign_labels(heads['student'], student[0], context.data_samples)
        outputs = []
        for level, (scores, is_positive) in enumerate(zip(student[0], positives)):
            ours, theirs = (
                regression_rows(heads[owner], level, features[1][level])
                for owner, features in (('student', student), ('teacher', teacher))
            )
            loss = localization_divergence(
                as_rows(scores, heads['student'].num_classes), ours, theirs, is_positive, self.tau
            )
            outputs.append(DistillOutput(dict(loss_ld=self.loss_weight * loss)))
        return outputs

    def describe(self) -> List[dict]:
        """Return the settings; see :meth:`DistillNeck.describe`."""
        return [dict(neck=type(self).__name__, loss_kd='LD', loss_weight=self.loss_weight)]


def check_two_taps(neck: DistillNeck, channels: Sequence) -> None:
    """Check that a pair has two taps.

    Raises:
        ValueError: If the pair does not have two taps per model.
    """
    if len(channels) != 2 or isinstance(channels[0], int):
        raise ValueError(
            f'{type(neck).__name__} needs two taps per model, the class layer and the box layer of the heads, such as '
            "['bbox_head.gfl_cls', 'bbox_head.gfl_reg']."
        )


def localization_divergence(scores: Tensor, student: Tensor, teacher: Tensor, positives: Tensor, tau: float) -> Tensor:
    """Sum the divergence of the four box sides over positive locations, weighted by the student's highest class score.

    Args:
        scores (Tensor): Class logits of the student, (R, K). They receive no gradient.
        student (Tensor): Logits of the student's distributions, (R, 4 * bins).
        teacher (Tensor): Logits of the teacher's distributions, (R, 4 * bins).
        positives (Tensor): Whether a location is positive, (R, ) of type bool.
        tau (float): Temperature.

    Returns:
        Tensor: A scalar, the sum divided by 4.
    """
    weights = scores[positives].detach().sigmoid().amax(dim=1)
    ours, theirs = (rows[positives].unflatten(1, (4, -1)) for rows in (student, teacher))
    return (distribution_divergence(ours, theirs, tau).sum(dim=1) * weights).sum() / (4 + EPS)


def distribution_divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return the KL divergence between softened distributions, averaged over the bins and multiplied by tau squared.

    Args:
        student (Tensor): Logits, (..., bins).
        teacher (Tensor): Logits, (..., bins).
        tau (float): Temperature.

    Returns:
        Tensor: One value per distribution, (...).
    """
    ours, theirs = (student / tau).log_softmax(dim=-1), (teacher / tau).log_softmax(dim=-1)
    return tau**2 * F.kl_div(ours, theirs, reduction='none', log_target=True).mean(dim=-1)
