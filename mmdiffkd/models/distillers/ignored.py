"""Pixels that a segmentation head does not learn from are not distilled into it either."""

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from .taps import find_module


def ignore_index_of(model: nn.Module, path: str) -> Optional[int]:
    """The label that the head around a tap ignores, None for taps outside such a head.

    Args:
        model (nn.Module): The student.
        path (str): The tap, for example ``'decode_head.conv_seg'``.
    """
    parts = path.split('.')
    for end in range(len(parts), 0, -1):
        label = getattr(find_module(model, '.'.join(parts[:end]), 'student'), 'ignore_index', None)
        if isinstance(label, int):
            return label
    return None


def counted_pixels(data_samples: Optional[Sequence], ignore_index: Optional[int]) -> Optional[Tensor]:
    """Where the label is not the one that is ignored; padding carries it, too.

    Args:
        data_samples (list, optional): Samples with ``gt_sem_seg``, (1, H, W) each.
        ignore_index (int, optional): The label, from :func:`ignore_index_of`.

    Returns:
        Tensor: (N, 1, H, W) of type bool; None where there are no such labels, and every pixel counts.
    """
    if ignore_index is None or not data_samples:
        return None
    labels = [getattr(sample.get('gt_sem_seg'), 'data', None) for sample in data_samples]
    if any(label is None for label in labels):
        return None
    return torch.stack([label != ignore_index for label in labels])
