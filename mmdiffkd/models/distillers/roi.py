"""RoI heads are compared on the same regions: the teacher's runs on the RoIs that the student sampled."""

from contextlib import contextmanager
from typing import Iterator, List

from torch import Tensor, nn


def is_roi_tap(path: str) -> bool:
    """Whether a tap lies in the box branch of a RoI head."""
    return path.startswith('roi_head.bbox_head')


def check_roi_head(model_cfg: dict, path: str, owner: str) -> None:
    """Check that a model has a single-stage RoI head.

    Raises:
        ValueError: If it has none, or one of several stages.
    """
    bbox_head = (model_cfg.get('roi_head') or {}).get('bbox_head')
    if bbox_head is None:
        raise ValueError(
            f"The tap '{path}' compares RoI heads, but the {owner} {model_cfg['type']} has none; leave this pair out."
        )
    if isinstance(bbox_head, (list, tuple)):
        raise ValueError(
            f"The tap '{path}' compares RoI heads, but the {owner}'s {model_cfg['roi_head']['type']} has "
            f"{len(bbox_head)} stages with box targets of their own, which cannot be compared with another head's; "
            'leave this pair out.'
        )


@contextmanager
def record_rois(model: nn.Module) -> Iterator[List[Tensor]]:
    """Record the RoIs, (R, 5), that a detector's box branch is called with."""
    rois: List[Tensor] = []
    extractor = model.roi_head.bbox_roi_extractor
    handle = extractor.register_forward_pre_hook(lambda module, args: rois.append(args[1]))
    try:
        yield rois
    finally:
        handle.remove()


def run_box_branch(model: nn.Module, inputs: Tensor, rois: Tensor) -> None:
    """Run a detector's box branch on images (N, 3, H, W) and RoIs (R, 5) given from outside."""
    model.roi_head._bbox_forward(model.extract_feat(inputs), rois)
