"""Base class of presets that distill the outputs of dense heads."""

from typing import Dict, List, Tuple

from torch import nn

from mmdiffkd.utils.meta_device import build_for_inspection

from ..necks.dense_heads import HEADS, find_dense_head, find_output_layer, predicts_distributions
from .base import Preset, short_type

BRANCHES = ('cls', 'reg')


class DenseHeadPreset(Preset):
    """Base class of presets that distill the class branch and the box branch of dense heads.

    A subclass sets :attr:`pair_name`, sets the ``type`` of the neck in ``neck_defaults``, and extends
    :meth:`check_heads` with the requirements of the method.

    Attributes:
        pair_name (str): Name of the pair.
    """

    weights = dict(detection=1.0)
    pair_name: str = ''

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair of the heads. Arguments: see :meth:`.Preset.default_pairs`."""
        return self.head_pair(student, student_cfg, teacher_cfg)

    def head_pair(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pair that compares the last layers of both heads. Arguments: see :meth:`.Preset.default_pairs`.

        Raises:
            ValueError: If a head is not supported, or the heads cannot be compared.
        """
        self.check_task(student_cfg)
        cfgs, models = (student_cfg, teacher_cfg), (student, build_for_inspection(teacher_cfg))
        heads = [self.find_head(owner, *both) for owner, *both in zip(('student', 'teacher'), models, cfgs)]
        self.check_heads(heads, cfgs)
        taps = [[f'bbox_head.{find_output_layer(head, branch)}' for branch in BRANCHES] for head in heads]
        return {self.pair_name: dict(student=taps[0], teacher=taps[1], neck=dict(self.neck_defaults))}

    def find_head(self, owner: str, model: nn.Module, cfg: dict) -> nn.Module:
        """Return the dense head of a model.

        Args:
            owner (str): ``'student'`` or ``'teacher'``.
            model (nn.Module): The model.
            cfg (dict): Config of the model.

        Raises:
            ValueError: If the model has no supported head.
        """
        head = find_dense_head(model)
        if head is None:
            own = type(model.bbox_head).__name__ if hasattr(model, 'bbox_head') else 'no bbox_head'
            raise self.refusal(
                f'needs a bbox_head of the type {", ".join(HEADS[:-1])} or {HEADS[-1]} with sigmoid scores, but the '
                f"{owner} {short_type(cfg)} has {own}; choose another preset, such as 'fgd'."
            )
        return head

    def check_heads(self, heads: List[nn.Module], cfgs: Tuple[dict, dict]) -> None:
        """Check that the heads of student and teacher can be compared.

        Raises:
            ValueError: If the heads cannot be compared. The message says what differs.
        """
        self.check_equal('strides', [[stride[0] for stride in head.prior_generator.strides] for head in heads])

    def check_equal(self, name: str, values: list) -> None:
        """Check that both heads have the same value of a property.

        Raises:
            ValueError: If the values differ.
        """
        if values[0] != values[1]:
            raise self.refusal(
                f'needs equal {name} in both heads, but the student has {values[0]} and the teacher {values[1]}.'
            )

    def check_distributions(self, heads: List[nn.Module], cfgs: Tuple[dict, dict]) -> None:
        """Check that both heads predict distributions of box sides with the same number of bins.

        Raises:
            ValueError: If a head predicts no distributions, or the numbers of bins differ.
        """
        for owner, head, cfg in zip(('student', 'teacher'), heads, cfgs):
            if not predicts_distributions(head):
                raise self.refusal(
                    f'needs heads that predict distributions of box sides (GFL), but the {owner} {short_type(cfg)} has '
                    f"a {type(head).__name__}; choose another preset, such as 'bckd'."
                )
        self.check_equal('reg_max', [head.reg_max for head in heads])
