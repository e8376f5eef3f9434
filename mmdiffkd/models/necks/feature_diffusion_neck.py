from typing import Any, List, Optional, Sequence, Union

from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, check_arguments

from ..diffusion.feature_diffusion import DiffusionOutput, FeatureDiffusion, NoiseInputs
from ..losses.utils import class_labels
from .base import DistillContext, DistillNeck, check_single_tap

Ints = Union[int, Sequence[int]]


@MODELS.register_module()
class FeatureDiffusionNeck(DistillNeck):
    """DiffKD neck for one pair of taps, with one :class:`FeatureDiffusion` per level.

    The neck can be used without a distiller: call it with student and teacher features, and sum the returned losses.

    Args:
        student_channels (int or list[int]): Student channels, one number per level.
        teacher_channels (int or list[int]): Teacher channels, one number per level.
        share_levels (bool): Whether all levels share one :class:`FeatureDiffusion`. All levels must then have the same
            channels. Defaults to False.
        compile (bool): Whether to apply ``torch.compile`` to denoiser, noise adapter and projection, instead of
            activation checkpointing. All levels and denoising steps share the compiled code. Defaults to False.
        **level_cfg: Arguments of :class:`FeatureDiffusion`, the same for all levels: ``latent_channels``,
            ``denoise``, ``align``, ``denoiser``, ``noise_adapter``, ``scheduler``, ``loss_kd``,
            ``loss_diffusion_weight``, ``loss_reconstruction_weight``, ``num_grad_steps``, ``memory_efficient``.

    Raises:
        ValueError: If an argument is invalid, if student and teacher have different numbers of levels or several taps,
            if ``share_levels`` is set and the channels differ between levels, or if ``compile`` conflicts with the
            other arguments.
    """

    part = FeatureDiffusion  # module class of a level
    denoises = True  # whether the levels denoise by default
    auxiliary_losses = ('loss_diffusion', 'loss_reconstruction')

    @check_arguments
    def __init__(
        self,
        student_channels: Union[int, Sequence[Any]],
        teacher_channels: Union[int, Sequence[Any]],
        share_levels: bool = False,
        compile: bool = False,
        **level_cfg,
    ):
        super().__init__()
        student_channels, teacher_channels = _as_list(student_channels), _as_list(teacher_channels)
        check_single_tap(self, student_channels, teacher_channels)
        if len(student_channels) != len(teacher_channels):
            raise ValueError(
                f'student_channels={student_channels} and teacher_channels={teacher_channels} must have one entry '
                'per level.'
            )
        widths = list(zip(student_channels, teacher_channels))
        if share_levels and len(set(widths)) > 1:
            raise ConfigError(
                'share_levels',
                f'=True needs the same channels on all levels, but student_channels={student_channels} and '
                f'teacher_channels={teacher_channels}.',
            )
        self.num_levels = len(widths)
        if share_levels:
            widths = widths[:1]
        if compile:
            if level_cfg.get('memory_efficient') or not level_cfg.get('denoise', True):
                raise ConfigError(
                    'compile',
                    '=True needs denoise=True and memory_efficient=False: torch.compile is applied to the diffusion '
                    'module, and chooses the activations to save.',
                )
            level_cfg['memory_efficient'] = False
        self.levels = nn.ModuleList(self.part(s, t, **level_cfg) for s, t in widths)
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
            student (Tensor or list[Tensor]): (N, C_s, H, W), or one such tensor per level.
            teacher (Tensor or list[Tensor]): (N, C_t, H, W), or one such tensor per level.
            context (DistillContext, optional): The neck uses ``mask`` (the valid pixels) and ``capture`` (whether to
                return the trajectory). If the loss needs labels, it also uses ``data_samples`` and ``class_numbers``.
                Defaults to None.
            noise_inputs (NoiseInputs or list[NoiseInputs], optional): Noise and timesteps to use instead of random
                ones. Defaults to None.

        Returns:
            DiffusionOutput or list[DiffusionOutput]: One output per level; a single output if the features are tensors.

        Raises:
            ValueError: If the number of levels or the batch size does not match, or if the loss needs labels and the
                data samples have none.
        """
        context = context or DistillContext()
        options = dict(mask=context.mask, return_trajectory=context.capture)
        if getattr(self.levels[0].loss_kd, 'takes_labels', False):
            labels = class_labels(context.data_samples)
            numbers = context.class_numbers
            options['labels'] = labels if numbers is None else numbers.to(labels.device)[labels]
        if isinstance(student, Tensor):
            return self.levels[0](student, teacher, noise_inputs, **options)
        if not len(student) == len(teacher) == self.num_levels:
            raise ValueError(
                f'The neck has {self.num_levels} levels, but received features of {len(student)} levels from the '
                f'student and {len(teacher)} from the teacher.'
            )
        noise_inputs = noise_inputs or [None] * self.num_levels
        inputs = zip(self._modules_of_levels(), student, teacher, noise_inputs)
        return [level(s, t, noise, **options) for level, s, t, noise in inputs]

    def describe(self) -> List[dict]:
        """Return the settings of each level; see :meth:`DistillNeck.describe`."""
        return [level.describe() for level in self._modules_of_levels()]

    def _modules_of_levels(self) -> List[nn.Module]:
        shared = len(self.levels) < self.num_levels
        return [self.levels[0]] * self.num_levels if shared else list(self.levels)


def _as_list(value: Ints) -> List[int]:
    return [value] if isinstance(value, int) else list(value)
