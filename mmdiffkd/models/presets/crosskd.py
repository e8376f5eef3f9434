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
    """CrossKD: run the teacher's head on features of the student; see :class:`.CrossKDNeck`.

    Features from the middle of the student's head run through the last layers of the teacher's frozen head. The
    resulting predictions are compared with the teacher's own predictions. The student's taps are the second-to-last
    convolutions of both branches of its head: the third of four, as in the paper. If the branches have no such
    convolutions, the student's tap is its neck. The heads may have different types and different classes.

    Weights:
        1 for the scores and 1 for the boxes. These weights are not from the released code.

    Released code:
        This preset was not compared with the released code. It follows the equations of the paper, so weights and
        exponents may differ from the released code. The paper averages the losses over all locations, most of which
        have no object. By default, this preset instead divides them by the sum of the teacher's highest class scores at
        the locations, and weights the box loss of each location by this score.

    Examples:
        To average over all locations, as in the paper::

            _base_ = './my_diffkd_config.py'
            model = dict(preset='crosskd', distill=dict(crosskd=dict(neck=dict(region='all'))))
    """

    summary = "CrossKD: predictions of the teacher's head for features of the student and of the teacher"
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
    """Return the number of convolutions in a branch of a head; 0 unless one sequence of them runs on all levels."""
    convs = getattr(head, f'{branch}_convs', ())
    return 0 if any(isinstance(conv, nn.ModuleList) for conv in convs) else len(convs)
