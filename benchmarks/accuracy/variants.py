"""Changes to the method itself that were tried.

Notation as in :mod:`mmdiffkd.models.diffusion.schedulers`; a is alphas_cumprod of a timestep.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from mmdiffkd.models import DiffusionOutput, FeatureDiffusion, FeatureDiffusionNeck, NoiseInputs
from mmdiffkd.registry import MODELS


class Variant(FeatureDiffusion):
    """DiffKD with changes; the defaults are the paper's.

    Args:
        student_channels (int): C_s.
        teacher_channels (int): C_t.
        denoising (bool): False leaves noise and denoising out: what stays is the aligned student, the convolution with
            BatchNorm after the last step, and the distance.
        normalise (bool): Give every channel of both features zero mean and unit variance before diffusion.
        group_norm (bool): GroupNorm in place of BatchNorm in denoiser and noise adapter, which keeps student and
            teacher passes apart.
        variance_preserving (bool): Blend the student with noise as diffusion does, sqrt(a) Z_s + sqrt(1 - a) eps with
            sqrt(a) = gamma, and start at the timestep that has this a.
        detach (bool): The distance does not train the denoiser; its gradient passes through to the student.
        **kwargs: Of :class:`FeatureDiffusion`. With the variance-preserving blend ``num_grad_steps`` has no effect and
            there is no trajectory.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        denoising: bool = True,
        normalise: bool = False,
        group_norm: bool = False,
        variance_preserving: bool = False,
        detach: bool = False,
        **kwargs,
    ):
        super().__init__(student_channels, teacher_channels, **kwargs)
        channels = self.align.out_channels
        self.denoising, self.detach, self.variance_preserving = denoising, detach, variance_preserving
        if group_norm:
            _to_group_norm(self.denoiser)
            _to_group_norm(self.noise_adapter)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in (channels, teacher_channels) if normalise)

    def forward(self, student: Tensor, teacher: Tensor, *args, **kwargs) -> DiffusionOutput:
        """Like :meth:`FeatureDiffusion.forward`."""
        if self.norms:
            teacher = self.norms[1](teacher)
        return super().forward(student, teacher, *args, **kwargs)

    def _align(self, student: Tensor, size: torch.Size) -> Tensor:
        latent = super()._align(student, size)
        return self.norms[0](latent) if self.norms else latent

    def _denoise(self, latent: Tensor, noise: Optional[Tensor], samples: Optional[List]) -> Tuple[Tensor, Tensor]:
        if not self.denoising:
            return latent, latent.new_ones(len(latent))
        denoise = self._denoise_preserving_variance if self.variance_preserving else super()._denoise
        learning = [p for p in self.denoiser.parameters() if p.requires_grad and self.detach]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            return denoise(latent, noise, samples)
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def _denoise_preserving_variance(self, latent: Tensor, noise, trajectory) -> Tuple[Tensor, Tensor]:
        gamma = self.noise_adapter(latent)
        noise = torch.randn_like(latent) if noise is None else noise
        table, last = self.scheduler.alphas_cumprod, len(self.scheduler.timesteps) - 1
        share = gamma.view(-1, 1, 1, 1)
        x = share * latent + (1 - share.square()).clamp(min=1e-6).sqrt() * noise
        start = (table >= gamma.detach().square().view(-1, 1)).sum(dim=1).clamp(max=len(table) - 1)
        timesteps = [start, *(start * (last - i) // last for i in range(1, last + 1))]
        alphas = [table[t].view(-1, 1, 1, 1) for t in timesteps]
        for index, (t, a) in enumerate(zip(timesteps, alphas)):
            eps = self.denoiser(x, t).float()
            clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
            if index < last:
                x = alphas[index + 1].sqrt() * clean + (1 - alphas[index + 1]).sqrt() * eps
        return clean, gamma

    def _diffusion_loss(self, target: Tensor, draws: NoiseInputs) -> Tensor:
        return super()._diffusion_loss(target, draws) if self.denoising else target.new_zeros(())


@MODELS.register_module()
class VariantNeck(FeatureDiffusionNeck):
    """A :class:`Variant` of its own for every level."""

    part = Variant


def _to_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = next(g for g in (8, 4, 2, 1) if child.num_features % g == 0)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _to_group_norm(child)
