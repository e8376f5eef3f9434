"""The preset ``crosskd``: cross-head distillation."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.meta_device import build_for_inspection

from ..necks.dense_heads import find_output_layer
from .base import short_type
from .dense_head_preset import BRANCHES, DenseHeadPreset


@PRESETS.register_module(name='crosskd')
class CrossKDPreset(DenseHeadPreset):
    """CrossKD: the head of the teacher judges features of the student; see :class:`.CrossKDNeck`.

    Features from the middle of the student's head run through the last layers of the teacher's frozen head. These
    predictions are compared with those of the teacher. The taps are the third of four convolutions in the student's
    head, as in the paper, or the neck if the head has no such convolutions. Classes and types of the heads may differ.

    Weights:
        1 for the scores and 1 for the boxes. They are not from the released code.

    Released code:
        It was not compared. This preset was written from the equations of the paper, so weights and exponents may
        differ. The paper averages over all locations, most of which have no object. The default here
        divides by the sum of the teacher's highest scores instead, and weights boxes by these scores.

    Examples:
        To average over all locations, as in the paper::

            _base_ = './my_diffkd_config.py'
            model = dict(preset='crosskd', distill=dict(crosskd=dict(neck=dict(region='all'))))
    """

    summary = "CrossKD: the teacher's head judges features of the student, compared by its predictions"
    paper = 'Wang et al., CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024, arXiv 2306.11369'
    needs = 'a GFL, ATSS, RetinaNet or FCOS head in the teacher, and the same strides in both heads'
    pair_name = 'crosskd'
    neck_defaults = dict(type='mmdiffkd.CrossKDNeck')

    def head_pair(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair; see :meth:`.DenseHeadPreset.head_pair`."""
        self.check_task(student_cfg)
        teacher_head = self.find_head('teacher', build_for_inspection(teacher_cfg), teacher_cfg)
        student_head = getattr(student, 'bbox_head', None)
        if not hasattr(student_head, 'prior_generator'):
            raise self.refusal(
                f'needs a dense head in the student, but {short_type(student_cfg)} has '
                f'{"no bbox_head" if student_head is None else type(student_head).__name__}.'
            )
        self.check_heads([student_head, teacher_head], (student_cfg, teacher_cfg))
        counts = [[count_convs(head, branch) for branch in BRANCHES] for head in (student_head, teacher_head)]
        if min(counts[0]) > 1 and min(counts[1]) > 0:
            taps = [f'bbox_head.{branch}_convs.{count - 2}' for branch, count in zip(BRANCHES, counts[0])]
            neck = dict(num_convs=1, head_channels=teacher_head.feat_channels if min(counts[1]) > 1 else None)
        else:
            taps = [self.feature_taps(student_cfg, teacher_cfg)[0]] * len(BRANCHES)
            neck = dict(num_convs=counts[1][0], head_channels=teacher_head.in_channels)
        outputs = [f'bbox_head.{find_output_layer(teacher_head, branch)}' for branch in BRANCHES]
        return {self.pair_name: dict(student=taps, teacher=outputs, neck={**self.neck_defaults, **neck})}


def count_convs(head: nn.Module, branch: str) -> int:
    """Return the number of convolutions of a branch that run one after another; 0 if there is no such list."""
    convs = getattr(head, f'{branch}_convs', ())
    return 0 if any(isinstance(conv, nn.ModuleList) for conv in convs) else len(convs)
