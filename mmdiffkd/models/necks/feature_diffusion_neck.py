from typing import List, Optional, Sequence, Union

from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from ..diffusion.feature_diffusion import DiffusionOutput, FeatureDiffusion, NoiseInputs
from .base import DistillContext, DistillNeck

Ints = Union[int, Sequence[int]]


@MODELS.register_module()
class FeatureDiffusionNeck(DistillNeck):
    """DiffKD for one pair of taps: a :class:`FeatureDiffusion` of its own for every level.

    It needs no distiller: feed it student and teacher features, add up the losses it returns.

    Args:
        student_channels (int or list[int]): Student channels, one number a level.
        teacher_channels (int or list[int]): Teacher channels, one number a level.
        share_levels (bool): Whether one part serves all levels, which must agree in their channels. Defaults to False.
        compile (bool): Whether ``torch.compile`` is applied to the chains of convolutions; all levels and steps share
            what is compiled. Defaults to False.
        **level_cfg: Arguments of :class:`FeatureDiffusion`, the same for every level: ``latent_channels``,
            ``denoise``, ``align``, ``denoiser``, ``noise_adapter``, ``scheduler``, ``loss_kd``,
            ``loss_diffusion_weight``, ``loss_reconstruction_weight``, ``num_grad_steps``, ``memory_efficient``.

    Raises:
        ValueError: If student and teacher differ in their number of levels, or levels that are to share a part in their
            channels, or if ``compile`` does not go with the other arguments.
    """

    part = FeatureDiffusion  # the module of a level
    auxiliary_losses = ('loss_diffusion', 'loss_reconstruction')

    def __init__(
        self,
        student_channels: Ints,
        teacher_channels: Ints,
        share_levels: bool = False,
        compile: bool = False,
        **level_cfg,
    ):
        super().__init__()
        student_channels, teacher_channels = _as_list(student_channels), _as_list(teacher_channels)
        if any(not isinstance(channels, int) for channels in (*student_channels, *teacher_channels)):
            raise ValueError(
                f'{type(self).__name__} compares one tap of the student with one of the teacher; make a pair for each '
                'tap, or give a neck that takes several.'
            )
        if len(student_channels) != len(teacher_channels):
            raise ValueError(
                f'student_channels={student_channels} and teacher_channels={teacher_channels} must have one entry '
                'for every level.'
            )
        widths = list(zip(student_channels, teacher_channels))
        if share_levels and len(set(widths)) > 1:
            raise ValueError(
                f'share_levels=True needs the same channels on all levels, but student_channels={student_channels} and '
                f'teacher_channels={teacher_channels}.'
            )
        self.num_levels = len(widths)
        if share_levels:
            widths = widths[:1]
        self.levels = nn.ModuleList(self.part(s, t, **level_cfg) for s, t in widths)
        if compile and (level_cfg.get('memory_efficient') or not level_cfg.get('denoise', True)):
            raise ValueError(
                'compile=True needs denoise=True and memory_efficient=False: it is the diffusion that is compiled, and '
                'torch.compile decides itself what to keep.'
            )
        for level in self.levels if compile else ():
            for part in (level.denoiser, level.noise_adapter, level.proj):
                part.compile()

    def forward(
        self,
        student: Union[Tensor, Sequence[Tensor]],
        teacher: Union[Tensor, Sequence[Tensor]],
        context: Optional[DistillContext] = None,
        noise_inputs: Union[NoiseInputs, Sequence[NoiseInputs], None] = None,
    ) -> Union[DiffusionOutput, List[DiffusionOutput]]:
        """Compare student and teacher features.

        Args:
            student (Tensor or list[Tensor]): (N, C_s, H, W), or one such tensor a level.
            teacher (Tensor or list[Tensor]): (N, C_t, H, W), or one such tensor a level.
            context (DistillContext, optional): Mask of valid pixels, and whether the outputs include the trajectory
                (``capture``). Defaults to None.
            noise_inputs (NoiseInputs or list[NoiseInputs], optional): Noise and timesteps given from outside. Defaults
                to None.

        Returns:
            DiffusionOutput or list[DiffusionOutput]: One output a level; bare where the features are bare tensors.

        Raises:
            ValueError: If the number of levels or the batch does not fit.
        """
        context = context or DistillContext()
        options = dict(mask=context.mask, return_trajectory=context.capture)
        if isinstance(student, Tensor):
            return self.levels[0](student, teacher, noise_inputs, **options)
        if not len(student) == len(teacher) == self.num_levels:
            raise ValueError(
                f'The neck has {self.num_levels} levels, but was given {len(student)} of the student and '
                f'{len(teacher)} of the teacher.'
            )
        noise_inputs = noise_inputs or [None] * self.num_levels
        inputs = zip(self._modules_of_levels(), student, teacher, noise_inputs)
        return [level(s, t, noise, **options) for level, s, t, noise in inputs]

    def describe(self) -> List[dict]:
        """See :meth:`DistillNeck.describe`."""
        return [level.describe() for level in self._modules_of_levels()]

    def _modules_of_levels(self) -> List[nn.Module]:
        shared = len(self.levels) < self.num_levels
        return [self.levels[0]] * self.num_levels if shared else list(self.levels)


def _as_list(value: Ints) -> List[int]:
    return [value] if isinstance(value, int) else list(value)
