from typing import List, Optional, Sequence, Union

from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from ..diffusion import DiffusionOutput, Draws, FeatureDiffusion

Ints = Union[int, Sequence[int]]


@MODELS.register_module()
class FeatureDiffusionNeck(nn.Module):
    """DiffKD for one pair of taps: a :class:`FeatureDiffusion` of its own for every level.

    It needs no distiller: feed it student and teacher features, add up the losses it returns.

    Args:
        student_channels (int or list[int]): Student channels, one number a level.
        teacher_channels (int or list[int]): Teacher channels, one number a level.
        **level_cfg: Arguments of :class:`FeatureDiffusion`, the same for every level: ``latent_channels``,
            ``denoise``, ``align``, ``denoiser``, ``noise_adapter``, ``schedule``, ``distance``,
            ``loss_diffusion_weight``, ``loss_reconstruction_weight``.

    Raises:
        ValueError: If student and teacher differ in their number of levels.
    """

    def __init__(self, student_channels: Ints, teacher_channels: Ints, **level_cfg):
        super().__init__()
        student_channels, teacher_channels = _as_list(student_channels), _as_list(teacher_channels)
        if len(student_channels) != len(teacher_channels):
            raise ValueError(
                f'student_channels={student_channels} and teacher_channels={teacher_channels} must have one entry '
                'for every level.'
            )
        pairs = zip(student_channels, teacher_channels)
        self.levels = nn.ModuleList(FeatureDiffusion(s, t, **level_cfg) for s, t in pairs)

    def forward(
        self,
        student: Union[Tensor, Sequence[Tensor]],
        teacher: Union[Tensor, Sequence[Tensor]],
        draws: Union[Draws, Sequence[Draws], None] = None,
        mask: Optional[Tensor] = None,
    ) -> Union[DiffusionOutput, List[DiffusionOutput]]:
        """Compare student and teacher features.

        Args:
            student (Tensor or list[Tensor]): (N, C_s, H, W), or one such tensor a level.
            teacher (Tensor or list[Tensor]): (N, C_t, H, W), or one such tensor a level.
            draws (Draws or list[Draws], optional): Random draws given from outside.
            mask (Tensor, optional): Pixels that count, (N, 1, h, w) of type bool, the same for all levels.

        Returns:
            DiffusionOutput or list[DiffusionOutput]: One output a level; bare where the features are bare tensors.

        Raises:
            ValueError: If the number of levels or the batch does not fit.
        """
        if isinstance(student, Tensor):
            return self.levels[0](student, teacher, draws, mask)
        if not len(student) == len(teacher) == len(self.levels):
            raise ValueError(
                f'The neck has {len(self.levels)} levels, but was given {len(student)} of the student and '
                f'{len(teacher)} of the teacher.'
            )
        draws = draws or [None] * len(self.levels)
        return [level(s, t, d, mask) for level, s, t, d in zip(self.levels, student, teacher, draws)]


def _as_list(value: Ints) -> List[int]:
    return [value] if isinstance(value, int) else list(value)
