"""Read the outputs of mmdet's dense heads: rows of predictions, boxes and assigned labels.

Necks for heads tap the last layers of the class branch and the box branch, such as ``bbox_head.gfl_cls`` and
``bbox_head.gfl_reg``. These layers run once per level, so a tap has one feature map per level of the head. A prior is
an anchor or a point of the head.
"""

from contextlib import suppress
from typing import List, Optional, Sequence, Tuple

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from .base import DistillContext

# heads of mmdet with one sigmoid score per class, a static label assignment and boxes that this module can decode
HEADS = ('GFLHead', 'ATSSHead', 'RetinaHead', 'FCOSHead')
EPS = torch.finfo(torch.float32).eps  # added to divisors, as in mmdet


def find_dense_head(model: nn.Module) -> Optional[nn.Module]:
    """Return the dense head of a detector; None if the head is not supported.

    The class of the head must be one of ``HEADS``, or a subclass that changes neither the forward pass nor the label
    assignment. The head must have sigmoid scores.
    """
    head = getattr(model, 'bbox_head', None)
    known = []
    with suppress(ImportError):  # mmdet is optional
        from mmdet.models import dense_heads

        known = [getattr(dense_heads, name) for name in HEADS]
    members = ('forward_single', 'get_targets')
    is_known = any(all(getattr(type(head), m, None) is getattr(cls, m) for m in members) for cls in known)
    return head if is_known and head.use_sigmoid_cls else None


def find_output_layer(head: nn.Module, branch: str) -> str:
    """Return the name of the last layer of a branch, ``'cls'`` or ``'reg'``, such as ``'gfl_cls'``."""
    return next(
        name for name, layer in head.named_children() if name.endswith(f'_{branch}') and isinstance(layer, nn.Conv2d)
    )


def predicts_distributions(head: nn.Module) -> bool:
    """Return whether a head predicts distributions of the distances to the four sides of a box, as GFL does."""
    return hasattr(head, 'reg_max')


def head_of(neck: nn.Module, owner: str, context: DistillContext, num_levels: int) -> nn.Module:
    """Return the dense head of a model, for a neck that compares all levels of the head.

    Args:
        neck (nn.Module): The neck, for error messages.
        owner (str): ``'student'`` or ``'teacher'``.
        context (DistillContext): Holds the models.
        num_levels (int): Number of distilled levels.

    Raises:
        ValueError: If there is no head, or not all its levels are distilled.
    """
    head = getattr(getattr(context, owner), 'bbox_head', None)
    name = type(neck).__name__
    if head is None:
        raise ValueError(f'{name} needs the bbox_head of the {owner}.')
    strides = head.prior_generator.strides
    if len(strides) != num_levels:
        raise ValueError(
            f'{name} compares all levels of a head: the head of the {owner} has {len(strides)} levels, but '
            f'{num_levels} are distilled. Both heads need the same strides; remove levels=[...] from the pair.'
        )
    return head


def as_rows(maps: Tensor, width: int) -> Tensor:
    """Reshape the output of a layer, (N, A * width, H, W), to one row per prior, (N * H * W * A, width)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, width).float()


def assign_labels(
    head: nn.Module, maps: Sequence[Tensor], data_samples: Optional[list]
) -> Tuple[List[Tensor], List[Tensor], Tensor]:
    """Assign the ground truth to the priors of a head, as the head does for its own losses.

    Args:
        head (nn.Module): A head of :func:`find_dense_head`.
        maps (list[Tensor]): Class scores, (N, A * K, H, W) per level.
        data_samples (list[DetDataSample]): Data samples with ground truth.

    Returns:
        tuple[list[Tensor], list[Tensor], Tensor]: Positive priors, (N * H * W * A, ) of type bool per level; label
        weights of the same shape, 0 for ignored priors; and the number of positive priors, see
        :func:`count_positives`.

    Raises:
        ValueError: If there are no data samples.
    """
    if data_samples is None:
        raise ValueError('Assigning labels to the priors of a head needs data samples with ground truth.')
    from mmdet.models.utils import unpack_gt_instances

    sizes, device = [level.shape[-2:] for level in maps], maps[0].device
    instances, ignored, metas = unpack_gt_instances(data_samples)
    if hasattr(head, 'regress_ranges'):  # FCOS: points instead of anchors, and no ignored points
        points = head.prior_generator.grid_priors(sizes, device=device)
        labels = [level.view(len(metas), -1) for level in head.get_targets(points, instances)[0]]
        weights = [torch.ones_like(level, dtype=torch.float32) for level in labels]
    else:
        anchors = head.get_anchors(sizes, metas, device=device)
        targets = head.get_targets(*anchors, instances, metas, batch_gt_instances_ignore=ignored)
        labels, weights = targets[-5:-3]  # count from the end, because GFL and ATSS return the anchors first
    positives = [(level >= 0) & (level < head.num_classes) for level in labels]
    count = count_positives(positives)
    return [level.flatten() for level in positives], [level.flatten() for level in weights], count


def count_positives(positives: Sequence[Tensor]) -> Tensor:
    """Return the number of positive priors of a batch, averaged over processes. An image without any counts as 1.

    Args:
        positives (list[Tensor]): Whether priors are positive, (N, priors) per level.
    """
    count = torch.cat(list(positives), dim=1).sum(dim=1).clamp(min=1).sum().float()
    all_reduce(count, op='mean')
    return count


def regression_rows(head: nn.Module, level: int, output: Tensor) -> Tensor:
    """Return the regression of a head. Some heads scale the output of their last layer and limit its range.

    Args:
        head (nn.Module): The head.
        level (int): The level.
        output (Tensor): Output of the last layer, (N, A * C, H, W).

    Returns:
        Tensor: One row per prior, (N * H * W * A, C). Heads that predict distributions give logits, with C = 4 *
        (reg_max + 1). All other heads give deltas or distances, with C = 4.
    """
    if hasattr(head, 'scales'):
        output = head.scales[level](output)
    rows = as_rows(output, 4 * (head.reg_max + 1) if predicts_distributions(head) else 4)
    if hasattr(head, 'norm_on_bbox'):  # FCOS
        return rows.clamp(min=0) if head.norm_on_bbox else rows.exp()
    return rows


def decode_boxes(head: nn.Module, level: int, rows: Tensor, priors: Tensor) -> Tensor:
    """Return the boxes that a head predicts.

    Args:
        head (nn.Module): The head.
        level (int): The level.
        rows (Tensor): Regression, one row per prior of a batch; see :func:`regression_rows`.
        priors (Tensor): Anchors, (priors, 4), or points, (priors, 2), of one image in pixels.

    Returns:
        Tensor: x1, y1, x2, y2 in units of the stride, one row per prior.
    """
    stride = head.prior_generator.strides[level][0]
    priors = priors.repeat(len(rows) // len(priors), 1)
    if predicts_distributions(head):
        return distances_to_boxes((priors[:, :2] + priors[:, 2:]) / 2 / stride, expected_distances(rows))
    if hasattr(head, 'norm_on_bbox'):
        return distances_to_boxes(priors / stride, rows if head.norm_on_bbox else rows / stride)
    boxes = head.bbox_coder.decode(priors, rows)
    return getattr(boxes, 'tensor', boxes) / stride


def expected_distances(logits: Tensor) -> Tensor:
    """Return the means of distributions over 0, 1, 2, ... from logits, (R, 4 * bins): (R, 4)."""
    probabilities = logits.unflatten(1, (4, -1)).softmax(dim=2)
    return probabilities @ torch.arange(probabilities.size(2), dtype=logits.dtype, device=logits.device)


def distances_to_boxes(centers: Tensor, distances: Tensor) -> Tensor:
    """Return boxes, (R, 4), from centers, (R, 2), and distances to the left, top, right and bottom, (R, 4)."""
    return torch.cat([centers - distances[:, :2], centers + distances[:, 2:]], dim=1)


def giou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the generalized IoU of boxes, (R, 4) each, as rows of x1, y1, x2, y2.

    The areas of union and hull are at least ``eps``, to avoid a division by 0.
    """
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (a, b)]
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    union, hull = (areas[0] + areas[1] - overlap).clamp(min=eps), hull.clamp(min=eps)
    return overlap / union - (hull - union) / hull
