"""Interface of necks: base class, inputs and outputs."""

import copy
import inspect
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdiffkd.utils.check_config import ConfigError, one_line

from ..losses.naming import check_names

Features = Union[Sequence[Tensor], Sequence[Sequence[Tensor]]]


@dataclass
class DistillContext:
    """Inputs of a neck in addition to the features.

    Attributes:
        images (Tensor, optional): Preprocessed images of the student, (N, C, H, W). If the student's tap runs on only a
            part of the batch, ``images`` has only this part.
        data_samples (list, optional): Data samples of the images, with ground truth, as the student's ``loss`` receives
            them. None if the student's inputs are several views per image or video clips.
        input_size (tuple[int, int], optional): Height and width of the images in pixels, including padding.
        progress (float): Completed fraction of the training, from 0 to 1.
        student (Module, optional): The student, for necks that use its heads.
        teacher (Module, optional): The frozen teacher, for necks that use its heads.
        mask (Tensor, optional): Mask of the pixels whose label the student's head does not ignore, (N, 1, H, W) of type
            bool. None if all pixels are valid.
        class_numbers (Tensor, optional): Set if student and teacher have different classes. It maps each class of the
            student to its index among the compared class scores, (K, ), or to -1 if the class is not compared. None if
            all classes are compared.
        capture (bool): Whether outputs should include features for visualization. Defaults to False.
    """

    images: Optional[Tensor] = None
    data_samples: Optional[list] = None
    input_size: Optional[Tuple[int, int]] = None
    progress: float = 0.0
    student: Optional[nn.Module] = None
    teacher: Optional[nn.Module] = None
    mask: Optional[Tensor] = None
    class_numbers: Optional[Tensor] = None
    capture: bool = False


@dataclass
class DistillOutput:
    """Losses of one level of a pair.

    Attributes:
        losses (dict[str, Tensor]): Weighted scalars. Their names must start with ``loss_``.
        logs (dict[str, Tensor]): Values to log, scalars or (N, ). Their names must not contain ``loss``.
    """

    losses: Dict[str, Tensor]
    logs: Dict[str, Tensor] = field(default_factory=dict)


class DistillNeck(nn.Module):
    """Base class of necks, which compare student and teacher features.

    The distiller builds a neck with the arguments ``student_channels`` and ``teacher_channels``: lists with the number
    of channels of each level. If the pair has several taps, each argument is a list with one such list per tap.
    Subclassing is optional, but a neck needs the methods of this class.

    Attributes:
        auxiliary_losses (tuple[str]): Names of losses that train only the neck. ``DistillScheduleHook`` does not change
            the weights of these losses.
    """

    auxiliary_losses: Tuple[str, ...] = ()

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> List[DistillOutput]:
        """Compare the features of one iteration.

        Args:
            student (list[Tensor] or list[list[Tensor]]): Student features, (N, C_s, H, W) per level. With several
                taps, one such list per tap.
            teacher (list[Tensor] or list[list[Tensor]]): Teacher features, (N, C_t, H', W') per level, in the same
                structure.
            context (DistillContext): Images, data samples, progress and both models.

        Returns:
            list[DistillOutput]: One output per level, or one output for all levels together.
        """
        raise NotImplementedError

    def describe(self) -> List[dict]:
        """Return settings to print before training: one dict per level, or one dict for all levels together.

        ``preview.py`` prints a column for each key of ``FeatureDiffusion.describe``, such as ``loss_kd`` (str),
        ``loss_weight`` (float) and ``adapter`` (str).
        """
        return [dict(neck=type(self).__name__)]


def check_neck(neck: nn.Module) -> None:
    """Check that a neck has the methods that the distiller calls.

    Raises:
        ValueError: If a method is missing or has a different signature.
    """
    name = type(neck).__name__
    if not callable(getattr(neck, 'describe', None)):
        raise ValueError(f'{name} has no method describe(); inherit from mmdiffkd.models.DistillNeck.')
    try:
        inspect.signature(neck.forward).bind('student', 'teacher', 'context')
    except TypeError as error:
        raise ValueError(f'{name}.forward must take (student, teacher, context): {error}.') from error


def check_single_tap(neck: nn.Module, *channels: Sequence) -> None:
    """Check that the pair has one tap per model. Necks that support only one tap call this function.

    Args:
        neck (Module): The neck.
        *channels (list): ``student_channels`` and ``teacher_channels`` of the neck.

    Raises:
        ValueError: If the pair has several taps.
    """
    if any(not isinstance(count, int) for counts in channels for count in counts):
        raise ValueError(
            f'{type(neck).__name__} compares one student tap with one teacher tap; define one pair per tap, or use a '
            'neck that accepts several taps.'
        )


def try_neck(neck: nn.Module, student: Features, teacher: Features, context: DistillContext) -> None:
    """Run a neck forward and backward on random features, and check its losses.

    If the forward pass fails, the error is logged and not raised, because the neck may need data samples or the
    teacher's modules.

    Raises:
        ValueError: If the name of a loss or logged value is invalid, if a loss is not a scalar, is negative or is not
            finite, or if no loss has a gradient with respect to the student features.
    """
    name = type(neck).__name__
    leaves = [feature for level in student for feature in ([level] if isinstance(level, Tensor) else level)]
    with torch.enable_grad():
        try:
            outputs = copy.deepcopy(neck)(student, teacher, context)  # a copy, because a neck can have buffers
        except Exception as error:
            message = f'The losses of {name} were not checked before training, because it fails on random features: '
            print_log(message + one_line(error), logger='current')
            return
        for output in outputs:
            check_names(output)
        losses = [(key, loss) for output in outputs for key, loss in output.losses.items()]
        for key, loss in losses:
            if not isinstance(loss, Tensor) or loss.dim() > 0:
                raise ConfigError('', f': {key} of {name} is not a scalar tensor.')
            if not loss.is_meta and not (loss.isfinite() and loss >= -1e-6):
                raise ConfigError('', f': {key} of {name} is {loss:g} for random features; it must be finite and >= 0.')
        total = sum(loss for _, loss in losses)
        if not any(loss.requires_grad for _, loss in losses) or not any(
            gradient is not None for gradient in torch.autograd.grad(total, leaves, allow_unused=True)
        ):
            raise ConfigError('', f': no loss of {name} has a gradient with respect to the student features.')
