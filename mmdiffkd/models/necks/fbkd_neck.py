from typing import Any, Dict, List, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Count, NonNegative, Positive, check_arguments

from ..losses.utils import spatial_attention
from .base import DistillContext, DistillNeck, DistillOutput, check_single_tap


class NonLocal(nn.Module):
    """Non-local block: each position gets the sum of the features of all positions, weighted by dot products.

    Keys and values are max-pooled twice: with size 2, then with size ``stride``. If a map is smaller than that, the
    pooling window is the whole map.

    Args:
        channels (int): Number of channels.
        reduction (int): Channel reduction factor of queries, keys and values.
        stride (int): Size and stride of the second pooling.
    """

    def __init__(self, channels: int, reduction: int, stride: int):
        super().__init__()
        inner = max(channels // reduction, 1)
        self.stride = stride
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention between all positions to a feature, (N, C, H, W)."""
        query, key, value = self.query(x).flatten(2), self._pool(self.key(x)), self._pool(self.value(x))
        weights = query.transpose(1, 2) @ key / key.size(2)
        y = self.out((value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
        if self.training and y[:, 0].numel() == 1:
            # batch statistics need more than one value per channel: use the running statistics
            norm = self.norm
            return x + F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return x + self.norm(y)

    def _pool(self, x: Tensor) -> Tensor:
        for size in (2, self.stride):
            x = F.max_pool2d(x, [min(size, side) for side in x.shape[2:]])
        return x.flatten(2)


class FBKDLevel(nn.Module):
    """FBKD for one level; see :class:`FBKDNeck`."""

    def __init__(self, student_channels: int, teacher_channels: int, reduction: int, stride: int, tau: float):
        super().__init__()
        self.tau = tau
        self.align = nn.Conv2d(student_channels, teacher_channels, 1)
        self.channel_adapter = nn.Linear(student_channels, teacher_channels)
        self.spatial_adapter = nn.Conv2d(1, 1, 3, padding=1)
        self.student_non_local = NonLocal(student_channels, reduction, stride)
        self.teacher_non_local = NonLocal(teacher_channels, reduction, stride)
        self.non_local_adapter = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Dict[str, Tensor]:
        """Return the four terms of the loss, without their weights.

        Args:
            student (Tensor): (N, C_s, H, W).
            teacher (Tensor): (N, C_t, H, W).
        """
        with torch.no_grad():
            attention = (spatial_attention(student, self.tau) + spatial_attention(teacher, self.tau)) / 2
        student_mean, teacher_mean = (x.mean(dim=(2, 3)) for x in (student, teacher))
        student_map, teacher_map = (x.mean(dim=1, keepdim=True) for x in (student, teacher))
        relations = self.non_local_adapter(self.student_non_local(student))
        return dict(
            attention=_norm(attention.sqrt() * (self.align(student) - teacher)),
            channel=_norm(self.channel_adapter(student_mean) - teacher_mean),
            spatial=_norm(self.spatial_adapter(student_map) - teacher_map),
            non_local=_norm(relations - self.teacher_non_local(teacher)),
        )


@MODELS.register_module()
class FBKDNeck(DistillNeck):
    """FBKD: attention-guided and non-local distillation of detectors (Zhang and Ma, ICLR 2021).

    Each level has four terms. Each term is the L2 norm of a difference between student and teacher over the whole
    batch, so it is not divided by the number of images:

    - ``attention``: the features, weighted by the mean of both models' spatial attention.
    - ``channel``: the mean of each channel over the positions.
    - ``spatial``: the mean of each position over the channels.
    - ``non_local``: the outputs of two non-local blocks, one on the student's and one on the teacher's features. Both
      blocks are trained.

    As in the released code, channel attention has no effect: it is left out. The student features are resized to the
    teacher's height and width.

    Args:
        student_channels (list[int]): Student channels, one number per level.
        teacher_channels (list[int]): Teacher channels, one number per level.
        loss_weight (float): Factor of all terms. Defaults to 1.
        attention_weight (float): Weight of ``attention``. Defaults to 7e-5.
        channel_weight (float): Weight of ``channel``. Defaults to 4e-3.
        spatial_weight (float): Weight of ``spatial``. Defaults to 4e-3.
        non_local_weight (float): Weight of ``non_local``. Defaults to 7e-5.
        tau (float): Temperature of the attention. Defaults to 0.5.
        reduction (int or list[int]): Channel reduction factor in the non-local blocks: one number for all levels, or
            one per level. If a list is too short, its last number is repeated. Defaults to ``(4, 4, 2, 2)``.
        maxpool_stride (int or list[int]): Size and stride of the second max pooling in the non-local blocks, in the
            same format. Defaults to ``(8, 4, 2, 2)``.

    Raises:
        ValueError: If an argument is invalid, or the pair has several taps.
    """

    @check_arguments
    def __init__(
        self,
        student_channels: Sequence[Any],
        teacher_channels: Sequence[Any],
        loss_weight: NonNegative = 1.0,
        attention_weight: NonNegative = 7e-5,
        channel_weight: NonNegative = 4e-3,
        spatial_weight: NonNegative = 4e-3,
        non_local_weight: NonNegative = 7e-5,
        tau: Positive = 0.5,
        reduction: Union[Count, Sequence[Count]] = (4, 4, 2, 2),
        maxpool_stride: Union[Count, Sequence[Count]] = (8, 4, 2, 2),
    ):
        super().__init__()
        check_single_tap(self, student_channels, teacher_channels)
        self.loss_weight = loss_weight
        self.weights = dict(
            attention=attention_weight, channel=channel_weight, spatial=spatial_weight, non_local=non_local_weight
        )
        count = len(student_channels)
        settings = zip(
            student_channels, teacher_channels, _per_level(reduction, count), _per_level(maxpool_stride, count)
        )
        self.levels = nn.ModuleList(FBKDLevel(*setting, tau) for setting in settings)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], context: DistillContext
    ) -> List[DistillOutput]:
        """Compare features; see :meth:`DistillNeck.forward`."""
        outputs = []
        for level, ours, theirs in zip(self.levels, student, teacher):
            if ours.shape[2:] != theirs.shape[2:]:
                ours = F.interpolate(ours, theirs.shape[2:], mode='bilinear', align_corners=False)
            terms = level(ours, theirs.detach())
            losses = {f'loss_{name}': self.loss_weight * self.weights[name] * term for name, term in terms.items()}
            outputs.append(DistillOutput(losses))
        return outputs

    def describe(self) -> List[dict]:
        """Return the settings of each level; see :meth:`DistillNeck.describe`."""
        return [
            dict(
                adapter=f'{level.align.in_channels} -> {level.align.out_channels}',
                loss_kd='FBKDNeck',
                loss_weight=self.loss_weight,
            )
            for level in self.levels
        ]


def _norm(difference: Tensor) -> Tensor:
    return torch.linalg.vector_norm(difference.float())


def _per_level(value: Union[int, Sequence[int]], count: int) -> List[int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values + values[-1:] * count)[:count]
