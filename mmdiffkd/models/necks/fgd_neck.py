from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
from mmengine.model import kaiming_init
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from ..losses.utils import spatial_attention
from .base import DistillContext, DistillNeck, DistillOutput, check_single_tap


@MODELS.register_module()
class FGDNeck(DistillNeck):
    """Focal and global distillation of detectors (Yang et al., CVPR 2022). It needs ground-truth boxes.

    The focal loss compares feature maps separately inside and outside of the boxes, weighted by the spatial and channel
    attention of the teacher. It also compares the attention of both models. The global loss compares the relations
    between positions, which two trained context blocks compute. All losses are sums over a feature map, divided by the
    number of images, as in the released code.

    The default weights are those of the released code for RetinaNet. For Faster R-CNN, the released code sets the
    weights of foreground, background, attention and relation to 5e-5, 2.5e-5, 5e-5 and 5e-7. For FCOS, it sets them to
    1.6e-3, 8e-4, 8e-4 and 8e-6, with ``tau=0.8``.

    Args:
        student_channels (list[int]): Student channels, one number per level.
        teacher_channels (list[int]): Teacher channels, one number per level.
        tau (float): Temperature of the attention. Defaults to 0.5.
        foreground_weight (float): Weight of the positions inside of boxes, alpha in the paper. Defaults to 1e-3.
        background_weight (float): Weight of the positions outside of boxes, beta in the paper. Defaults to 5e-4.
        attention_weight (float): Weight of the attention loss, gamma in the paper. Defaults to 5e-4.
        relation_weight (float): Weight of the relation loss, lambda in the paper. Defaults to 5e-6.
        padded_boxes (bool): Whether to use the image size with padding to scale boxes to a feature map. False uses the
            size without padding, as the released code does; this shifts the boxes of padded images. Defaults to True.

    Raises:
        ValueError: If an argument is invalid, or the pair has several taps.
    """

    @check_arguments
    def __init__(
        self,
        student_channels: Sequence[Any],
        teacher_channels: Sequence[Any],
        tau: Positive = 0.5,
        foreground_weight: NonNegative = 1e-3,
        background_weight: NonNegative = 5e-4,
        attention_weight: NonNegative = 5e-4,
        relation_weight: NonNegative = 5e-6,
        padded_boxes: bool = True,
    ):
        super().__init__()
        check_single_tap(self, student_channels, teacher_channels)
        self.levels = nn.ModuleList(FGDLevel(s, t, tau) for s, t in zip(student_channels, teacher_channels))
        self.weights = dict(
            foreground=foreground_weight,
            background=background_weight,
            attention=attention_weight,
            relation=relation_weight,
        )
        self.padded_boxes = padded_boxes

    def forward(self, student: List[Tensor], teacher: List[Tensor], context: DistillContext) -> List[DistillOutput]:
        """Compare feature maps.

        Args:
            student (list[Tensor]): (N, C_s, H, W) per level.
            teacher (list[Tensor]): (N, C_t, H', W') per level. The student's maps are resized to these sizes.
            context (DistillContext): Needs ``data_samples`` with ``gt_instances``, and ``input_size``.

        Returns:
            list[DistillOutput]: ``loss_foreground``, ``loss_background``, ``loss_attention`` and ``loss_relation`` per
            level.

        Raises:
            ValueError: If the data samples have no boxes.
        """
        boxes = ground_truth_boxes(context.data_samples)
        sizes = [context.input_size] * len(boxes)
        if not self.padded_boxes:
            sizes = [sample.img_shape[:2] for sample in context.data_samples]
        outputs = []
        for level, ours, theirs in zip(self.levels, student, teacher):
            foreground, background = box_masks(boxes, sizes, theirs.shape[-2:])
            losses = level(ours, theirs, foreground, background)._asdict()
            outputs.append(DistillOutput({f'loss_{key}': self.weights[key] * loss for key, loss in losses.items()}))
        return outputs

    def describe(self) -> List[dict]:
        """Return the settings of each level; see :meth:`DistillNeck.describe`."""
        weights = {f'{key}_weight': weight for key, weight in self.weights.items()}
        return [
            dict(neck=type(self).__name__, loss_kd='FGD', adapter=level.adapter, **weights) for level in self.levels
        ]


class FGDLosses(NamedTuple):
    """Losses of one level without their weights."""

    foreground: Tensor
    background: Tensor
    attention: Tensor
    relation: Tensor


class FGDLevel(nn.Module):
    """Focal and global losses of one level.

    Args:
        student_channels (int): Student channels.
        teacher_channels (int): Teacher channels. If the student's channels differ, a 1x1 convolution maps them.
        tau (float): Temperature of the attention.
    """

    def __init__(self, student_channels: int, teacher_channels: int, tau: float):
        super().__init__()
        self.tau = tau
        is_equal = student_channels == teacher_channels
        self.adapter = None if is_equal else f'{student_channels} -> {teacher_channels}'
        self.align = nn.Identity() if is_equal else nn.Conv2d(student_channels, teacher_channels, 1)
        self.relation_student = ContextBlock(teacher_channels)
        self.relation_teacher = ContextBlock(teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, foreground: Tensor, background: Tensor) -> FGDLosses:
        """Compare feature maps.

        Args:
            student (Tensor): (N, C_s, H, W).
            teacher (Tensor): (N, C_t, H', W').
            foreground (Tensor): Weights of positions in boxes, (N, H', W'); see :func:`box_masks`.
            background (Tensor): Weights of positions outside of boxes, (N, H', W').

        Returns:
            FGDLosses: Scalars.
        """
        student, teacher = self.align(student).float(), teacher.float()
        if student.shape[-2:] != teacher.shape[-2:]:
            student = nn.functional.interpolate(student, teacher.shape[-2:], mode='bilinear', align_corners=False)
        ours, theirs = attention(student, self.tau), attention(teacher, self.tau)
        spatial, channel = theirs
        error = ((student - teacher).square() * channel[..., None, None]).sum(dim=1) * spatial
        differences = [(a - b).abs().sum() for a, b in zip(ours, theirs)]
        relations = self.relation_student(student) - self.relation_teacher(teacher)
        images = len(student)
        return FGDLosses(
            (error * foreground).sum() / images,
            (error * background).sum() / images,
            sum(differences) / images,
            relations.square().sum() / images,
        )


class ContextBlock(nn.Module):
    """Add a transformed, attention-weighted mean over positions to a feature map (Cao et al., ICCVW 2019).

    Args:
        channels (int): Channels of the feature map.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 2)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )
        kaiming_init(self.mask, mode='fan_in')
        # with zero weights in the last layer, the block starts as the identity
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Return a feature map of the same shape, (N, C, H, W)."""
        weights = self.mask(feature).flatten(2).softmax(dim=2)
        context = (feature.flatten(2) * weights).sum(dim=2)
        return feature + self.transform(context[..., None, None])


def attention(feature: Tensor, tau: float) -> Tuple[Tensor, Tensor]:
    """Return spatial attention, (N, H, W), and channel attention, (N, C). Both have a mean of 1 in each image."""
    channel = (feature.abs().mean(dim=(2, 3)) / tau).softmax(dim=1) * feature.size(1)
    return spatial_attention(feature, tau)[:, 0], channel


def ground_truth_boxes(data_samples) -> List[Tensor]:
    """Return the boxes of each image, (boxes, 4), in pixels of the image.

    Raises:
        ValueError: If the data samples have no boxes.
    """
    instances = [getattr(sample, 'gt_instances', None) for sample in data_samples or ()]
    if not instances or any(not hasattr(instance, 'bboxes') for instance in instances):
        raise ValueError(
            'FGDNeck needs the boxes of the ground truth: data samples of a detector, with gt_instances.bboxes.'
        )
    return [getattr(instance.bboxes, 'tensor', instance.bboxes) for instance in instances]


def box_masks(
    boxes: Sequence[Tensor], image_sizes: Sequence[Tuple[int, int]], map_size: Tuple[int, int]
) -> Tuple[Tensor, Tensor]:
    """Return the weights of positions inside and outside of boxes.

    A position in a box has the weight 1 / area of the smallest box around it. The area is counted in positions, from
    the first to the last position that the box touches, both included. Positions outside of all boxes have equal
    weights that sum to 1 in each image.

    Args:
        boxes (list[Tensor]): Boxes of each image, (boxes, 4), as x1, y1, x2, y2 in pixels.
        image_sizes (list[tuple[int, int]]): Height and width of each image in pixels.
        map_size (tuple[int, int]): Height and width of the feature map.

    Returns:
        tuple[Tensor, Tensor]: Foreground and background, (N, H, W) each.
    """
    height, width = map_size
    masks = []
    for corners, (image_height, image_width) in zip(boxes, image_sizes):
        scale = corners.new_tensor([width / image_width, height / image_height])
        start, end = (corners[:, :2] * scale).floor(), (corners[:, 2:] * scale).ceil()
        weights = 1 / (end - start + 1).prod(dim=1)
        x, y = (torch.arange(size, device=corners.device) for size in (width, height))
        in_x = (x >= start[:, :1]) & (x <= end[:, :1])
        in_y = (y >= start[:, 1:]) & (y <= end[:, 1:])
        inside = (in_y[:, :, None] & in_x[:, None, :]) * weights[:, None, None]
        # a row of zeros, because an image may have no boxes
        masks.append(torch.cat([inside.new_zeros(1, height, width), inside]).amax(dim=0))
    foreground = torch.stack(masks)
    background = (foreground == 0).to(foreground)
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)
