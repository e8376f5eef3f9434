from typing import Any, List, Literal, Optional, Sequence

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Channels, Natural, NonNegative, Positive, check_arguments

from .base import DistillContext, DistillNeck, DistillOutput
from .bckd_neck import score_divergence
from .dense_heads import (
    as_rows,
    decode_boxes,
    find_output_layer,
    giou,
    head_of,
    predicts_distributions,
    regression_rows,
)
from .ld_neck import check_two_taps, distribution_divergence

BRANCHES = ('cls', 'reg')


@MODELS.register_module()
class CrossKDNeck(DistillNeck):
    """Cross-head distillation: run the teacher's head on features of the student (Wang et al., CVPR 2024).

    Features of the student, from the middle of its head or from its neck, run through the last layers of the teacher's
    frozen head. The predictions are compared with those of the teacher: class scores by the quality focal loss, boxes
    by 1 - GIoU, and distributions of box sides, as in GFL, by KL divergence. The student's own last layers are not
    distilled, so they are trained by the labels only.

    The loss of a branch is sum(S * D) / sum(S) over the locations of all levels, where D is the distance at a location
    and S is the weight of the location. The paper sets S = 1. Most locations have no object. There, D is small, and the
    teacher's boxes are meaningless. By default, S is therefore the teacher's highest class score at the location; only
    the numerator of the class loss keeps S = 1. ``region='all'`` sets S = 1 everywhere.

    This class follows the equations of the paper. Weights and exponents may differ from the paper's code.

    The student's taps are the features for the class branch and for the box branch: ``student=['bbox_head.cls_convs.2',
    'bbox_head.reg_convs.2']``. The teacher's taps are the last layers of these branches:
    ``teacher=['bbox_head.gfl_cls', 'bbox_head.gfl_reg']``.

    Args:
        student_channels (list[list[int]]): Student channels per tap and level.
        teacher_channels (list[list[int]]): Teacher channels per tap and level.
        num_convs (int): Number of convolutions of the teacher's branches to run before the last layer. Defaults to 1.
        head_channels (int, optional): Input channels of the teacher's layers. If the student has a different number of
            channels, each branch gets a 1x1 convolution that maps the student's features. None means that the numbers
            are equal. Defaults to None.
        beta (float): Exponent of the score difference in the class loss. Defaults to 2.
        tau (float): Temperature of the distributions of box sides. Defaults to 1.
        region (str): Weight S of the locations: ``'score'`` for the teacher's highest class score, or ``'all'`` for 1.
            Defaults to ``'score'``.
        cls_weight (float): Weight of the class loss. Defaults to 1.
        reg_weight (float): Weight of the box loss. Defaults to 1.

    Raises:
        ValueError: If an argument is invalid.
        ValueError: If the pair does not have two taps.
    """

    @check_arguments
    def __init__(
        self,
        student_channels: Sequence[Any],
        teacher_channels: Sequence[Any],
        num_convs: Natural = 1,
        head_channels: Optional[Channels] = None,
        beta: NonNegative = 2.0,
        tau: Positive = 1.0,
        region: Literal['score', 'all'] = 'score',
        cls_weight: NonNegative = 1.0,
        reg_weight: NonNegative = 1.0,
    ):
        super().__init__()
        check_two_taps(self, student_channels)
        widths = [channels[0] for channels in student_channels]
        self.adapters = [None if head_channels in (None, w) else f'{w} -> {head_channels}' for w in widths]
        # the layers of a head are shared by all levels, so the 1x1 convolutions are shared, too
        self.align = nn.ModuleList(
            nn.Conv2d(width, head_channels, 1) if adapter else nn.Identity()
            for width, adapter in zip(widths, self.adapters)
        )
        self.num_convs = num_convs
        self.beta = beta
        self.tau = tau
        self.region = region
        self.weights = dict(cls=cls_weight, reg=reg_weight)

    def forward(
        self, student: List[List[Tensor]], teacher: List[List[Tensor]], context: DistillContext
    ) -> List[DistillOutput]:
        """Compare the predictions of the teacher's head for features of the student and of the teacher.

        Args:
            student (list[list[Tensor]]): Features for the class branch and for the box branch, (N, C, H, W) per level.
            teacher (list[list[Tensor]]): Outputs of the teacher's class layer, (N, A * K, H, W) per level, and box
                layer, (N, A * C, H, W) per level.
            context (DistillContext): Needs the teacher.

        Returns:
            list[DistillOutput]: ``loss_cls`` and ``loss_reg`` per level.

        Raises:
            ValueError: If the teacher is missing, if not all levels of its head are distilled, or if a branch of the
                head has fewer than ``num_convs`` convolutions.
        """
        head = head_of(self, 'teacher', context, len(teacher[0]))
        cross = [
            [self.run_branch(head, branch, align(level)) for level in levels]
            for branch, align, levels in zip(BRANCHES, self.align, student)
        ]
        sizes = [level.shape[-2:] for level in teacher[0]]
        all_priors = head.prior_generator.grid_priors(sizes, device=teacher[0][0].device)
        logits = [as_rows(level, head.num_classes) for level in teacher[0]]
        regions = [
            rows.sigmoid().amax(dim=1) if self.region == 'score' else torch.ones_like(rows[:, 0]) for rows in logits
        ]
        total = torch.cat(regions).sum()
        all_reduce(total, op='mean')
        total = total.clamp(min=1)
        outputs = []
        for level, priors in enumerate(all_priors):
            ours = as_rows(cross[0][level], head.num_classes)
            cls = score_divergence(ours, logits[level], self.beta)
            rows = [regression_rows(head, level, maps[1][level]) for maps in (cross, teacher)]
            reg = self.compare_boxes(head, level, *rows, priors) * regions[level]
            losses = dict(cls=cls.sum() / total, reg=reg.sum() / total)
            outputs.append(DistillOutput({f'loss_{key}': self.weights[key] * loss for key, loss in losses.items()}))
        return outputs

    def run_branch(self, head: nn.Module, branch: str, feature: Tensor) -> Tensor:
        """Run the last layers of a branch of the teacher's head on a feature map, (N, C, H, W)."""
        convs = getattr(head, f'{branch}_convs')
        if self.num_convs > len(convs):
            raise ValueError(f"num_convs={self.num_convs}, but the teacher's head has {len(convs)} {branch}_convs.")
        for conv in convs[len(convs) - self.num_convs :]:
            feature = conv(feature)
        return getattr(head, find_output_layer(head, branch))(feature)

    def compare_boxes(self, head: nn.Module, level: int, student: Tensor, teacher: Tensor, priors: Tensor) -> Tensor:
        """Return the distance between two regressions, (R, C) each, per prior.

        If the head predicts distributions, the distance is the KL divergence, averaged over the four box sides.
        Otherwise, the distance is 1 - GIoU.
        """
        if predicts_distributions(head):
            sides = [rows.unflatten(1, (4, -1)) for rows in (student, teacher)]
            # distribution_divergence() is a mean over bins; multiply by their number to get the sum
            return distribution_divergence(*sides, self.tau).mean(dim=1) * sides[0].size(2)
        return 1 - giou(*(decode_boxes(head, level, rows, priors) for rows in (student, teacher)))

    def describe(self) -> List[dict]:
        """Return the settings; see :meth:`DistillNeck.describe`."""
        adapter = next(filter(None, self.adapters), None)
        weights = {f'{key}_weight': weight for key, weight in self.weights.items()}
        return [dict(neck=type(self).__name__, loss_kd='CrossKD', adapter=adapter, **weights)]
