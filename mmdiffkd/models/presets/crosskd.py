"""The preset ``crosskd``: cross-head distillation."""

from typing import Dict

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.meta_device import build_for_inspection

from ..necks.dense_heads import find_output_layer
from .base import short_type
from .dense_head import BRANCHES, DenseHeadPreset


@PRESETS.register_module(name='crosskd')
class CrossKDPreset(DenseHeadPreset):
    """Cross-head distillation: the teacher's head judges features of the student; see :class:`.CrossKDNeck`.

    - Taps: in the student, the inputs of the last convolution before the last layer of both branches, as in the paper
      (the third of four convolutions); or the neck, if the student's head has no such convolutions. In the teacher,
      the last layers of both branches.
    - Weights: 1 for the scores and 1 for the boxes. They are not from the released code.
    - Needs: a GFL, ATSS, RetinaNet or FCOS head in the teacher, and a head with the same strides in the student.
      Classes and type of head may differ.
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
            raise self.refuse(
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
