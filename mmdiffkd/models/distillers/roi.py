"""RoI heads are compared on the same regions: the teacher's runs on the RoIs that the student sampled."""

from contextlib import contextmanager
from typing import Dict, Iterator, List

from torch import Tensor, nn

from .pairs import Pair

# What makes the box regression of two heads comparable
COMPARABLE = ('bbox_coder', 'reg_class_agnostic', 'num_classes')


def is_roi_tap(path: str) -> bool:
    """Whether a tap lies in the box branch of a RoI head."""
    return path.split('.')[:2] == ['roi_head', 'bbox_head']


def check_roi_taps(pairs: Dict[str, Pair], student_cfg: dict, teacher_cfg: dict) -> None:
    """Check that what is compared in RoI heads can be compared.

    Args:
        pairs (dict[str, Pair]): All pairs.
        student_cfg (dict): Config of the student.
        teacher_cfg (dict): Config of the teacher.

    Raises:
        ValueError: If it cannot; it names the pair and the reason.
    """
    roi_pairs = {name: pair for name, pair in pairs.items() if _in_roi_head(pair.student) or _in_roi_head(pair.teacher)}
    for name, pair in roi_pairs.items():
        for path in (pair.student, pair.teacher):
            if not is_roi_tap(path):
                raise ValueError(
                    f"distill.{name} taps '{path}', but RoI heads are compared inside 'roi_head.bbox_head' on both "
                    'sides, where they run on the same regions.'
                )
        heads = [_box_head(name, owner, cfg) for owner, cfg in (('student', student_cfg), ('teacher', teacher_cfg))]
        for key in COMPARABLE:
            ours, theirs = (head.get(key) for head in heads)
            if ours != theirs:
                raise ValueError(
                    f'distill.{name}: the box heads of student and teacher differ in {key} ({ours} and {theirs}), so '
                    'their outputs mean different things; leave this pair out.'
                )
    if roi_pairs:
        for name, pair in pairs.items():
            if name not in roi_pairs and pair.teacher.split('.')[0] not in ('backbone', 'neck'):
                raise ValueError(
                    f"distill.{name} taps the teacher's '{pair.teacher}', which is not run when RoI heads are compared "
                    f'(distill.{next(iter(roi_pairs))}); leave one of the two pairs out.'
                )


def _in_roi_head(path: str) -> bool:
    return path.split('.')[0] == 'roi_head'


def _box_head(name: str, owner: str, model_cfg: dict) -> dict:
    bbox_head = (model_cfg.get('roi_head') or {}).get('bbox_head')
    if bbox_head is None:
        raise ValueError(
            f'distill.{name} compares RoI heads, but the {owner} {model_cfg["type"]} has none; leave this pair out.'
        )
    if isinstance(bbox_head, (list, tuple)):
        raise ValueError(
            f"distill.{name} compares RoI heads, but the {owner}'s {model_cfg['roi_head']['type']} has "
            f"{len(bbox_head)} stages with box targets of their own, which cannot be compared with another head's; "
            'leave this pair out.'
        )
    return bbox_head


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
