"""The protocol of necks: what the distiller gives them and what they return."""

import inspect
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

Features = Union[Sequence[Tensor], Sequence[Sequence[Tensor]]]


@dataclass
class DistillContext:
    """What a neck can look at besides the features.

    Attributes:
        images (Tensor, optional): Preprocessed images of the student, (N, 3, H, W).
        data_samples (list, optional): Their data samples, with the ground truth. None for models that take views or
            clips.
        input_size (tuple[int, int], optional): Height and width of the images in pixels, padding included.
        progress (float): Share of the training that is done, from 0 to 1.
        student (Module, optional): The student, for its heads.
        teacher (Module, optional): The frozen teacher, for its heads.
        mask (Tensor, optional): Pixels whose label the student's head does not ignore, (N, 1, H, W) of type bool. None
            where all pixels count.
        capture (bool): Whether outputs should include the features that are drawn. Defaults to False.
    """

    images: Optional[Tensor] = None
    data_samples: Optional[list] = None
    input_size: Optional[Tuple[int, int]] = None
    progress: float = 0.0
    student: Optional[nn.Module] = None
    teacher: Optional[nn.Module] = None
    mask: Optional[Tensor] = None
    capture: bool = False


@dataclass
class DistillOutput:
    """The losses of one level of a pair.

    Attributes:
        losses (dict[str, Tensor]): Weighted scalars; their names start with ``loss_``.
        logs (dict[str, Tensor]): Values that are logged and not optimized, scalars or (N, ).
    """

    losses: Dict[str, Tensor]
    logs: Dict[str, Tensor] = field(default_factory=dict)


class DistillNeck(nn.Module):
    """Base class of necks, which compare the features of student and teacher.

    A pair builds its neck with ``student_channels`` and ``teacher_channels``: a list with the channels of each level,
    or where the pair has several taps, one such list for each tap. A neck need not be a subclass, but it needs the
    methods of this class.

    Attributes:
        auxiliary_losses (tuple[str]): Losses that train the neck and not the student. ``DistillScheduleHook`` does not
            scale them.
    """

    auxiliary_losses: Tuple[str, ...] = ()

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> List[DistillOutput]:
        """Compare the features of one iteration.

        Args:
            student (list[Tensor] or list[list[Tensor]]): The student's features, (N, C_s, H, W) for each level. With
                several taps, one such list for each tap.
            teacher (list[Tensor] or list[list[Tensor]]): The teacher's features, (N, C_t, H', W'), likewise.
            context (DistillContext): Images, data samples, progress and both models.

        Returns:
            list[DistillOutput]: One for each level, or a single one for all.
        """
        raise NotImplementedError

    def describe(self) -> List[dict]:
        """Settings to print before training, a dict for each level, or one for all.

        ``loss_kd`` (str), ``loss_weight`` (float), ``adapter`` (str) and the like have a column in the preview.
        """
        return [dict(neck=type(self).__name__)]


def check_neck(neck: nn.Module) -> None:
    """Check that a neck has what the distiller calls.

    Raises:
        TypeError: If a part is missing; it names the part.
    """
    name = type(neck).__name__
    if not callable(getattr(neck, 'describe', None)):
        raise TypeError(f'{name} has no method describe(); inherit from mmdiffkd.models.DistillNeck.')
    try:
        inspect.signature(neck.forward).bind('student', 'teacher', 'context')
    except TypeError as error:
        raise TypeError(f'{name}.forward must take (student, teacher, context): {error}.') from error
