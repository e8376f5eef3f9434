"""Variants of DiffKD that change the method itself.

The notation is that of :mod:`mmdiffkd.models.diffusion.schedulers`. ``a`` is the value of ``alphas_cumprod`` at a
timestep.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from mmdiffkd.models import DiffusionOutput, FeatureDiffusion, FeatureDiffusionNeck, NoiseInputs
from mmdiffkd.registry import MODELS


class Variant(FeatureDiffusion):
    """DiffKD with changes to the method. The defaults are the method of the paper.

    Args:
        student_channels (int): Channels of the student's feature, C_s.
        teacher_channels (int): Channels of the teacher's feature, C_t.
        denoising (bool): Whether to add noise and denoise. False keeps only three parts: the layer that aligns the
            student's feature, the distance, and the convolution with BatchNorm that otherwise follows the last
            denoising step. Defaults to True.
        normalize (bool): Whether to normalize every channel of both features to zero mean and unit variance before
            diffusion. Defaults to False.
        group_norm (bool): Whether denoiser and noise adapter use GroupNorm instead of BatchNorm, so that student and
            teacher features do not share statistics. Defaults to False.
        variance_preserving (bool): Whether to blend the student feature Z_s and the noise eps as in forward diffusion,
            sqrt(a) Z_s + sqrt(1 - a) eps, where the noise adapter's gamma is used as sqrt(a). Denoising then starts at
            the timestep with this a. Defaults to False.
        detach (bool): Whether to train the denoiser by the diffusion loss only. The gradient of ``loss_kd`` still
            passes through the denoiser to the student. Defaults to False.
        **kwargs: Arguments of :class:`FeatureDiffusion`. With ``variance_preserving``, ``num_grad_steps`` has no effect
            and no trajectory is returned.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        denoising: bool = True,
        normalize: bool = False,
        group_norm: bool = False,
        variance_preserving: bool = False,
        detach: bool = False,
        **kwargs,
    ):
        super().__init__(student_channels, teacher_channels, **kwargs)
        if detach:
            # _denoise() freezes the denoiser in the forward pass only, so a recomputation in the backward pass would
            # build a different graph
            self.memory_efficient = False
        channels = self.align.out_channels
        self.denoising, self.detach, self.variance_preserving = denoising, detach, variance_preserving
        if group_norm:
            _to_group_norm(self.denoiser)
            _to_group_norm(self.noise_adapter)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in (channels, teacher_channels) if normalize)

    def forward(self, student: Tensor, teacher: Tensor, *args, **kwargs) -> DiffusionOutput:
        """Run :meth:`FeatureDiffusion.forward`, with the teacher's feature normalized if ``normalize`` is True."""
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
        detached = [p for p in self.denoiser.parameters() if p.requires_grad and self.detach]
        for parameter in detached:
            parameter.requires_grad_(False)
        try:
            return denoise(latent, noise, samples)
        finally:
            for parameter in detached:
                parameter.requires_grad_(True)

    def _denoise_preserving_variance(self, latent: Tensor, noise, samples) -> Tuple[Tensor, Tensor]:
        gamma = self.noise_adapter(latent)
        noise = torch.randn_like(latent) if noise is None else noise
        table, last = self.scheduler.alphas_cumprod, len(self.scheduler.timesteps) - 1
        scale = gamma.view(-1, 1, 1, 1)
        x = scale * latent + (1 - scale.square()).clamp(min=1e-6).sqrt() * noise
        start = (table >= gamma.detach().square().view(-1, 1)).sum(dim=1).clamp(max=len(table) - 1)
        timesteps = [start, *(start * (last - i) // last for i in range(1, last + 1))]
        alphas = [table[t].view(-1, 1, 1, 1) for t in timesteps]
        for index, (t, a) in enumerate(zip(timesteps, alphas)):
            eps = self.denoiser(x, t).float()
            clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
            if index < last:
                x = alphas[index + 1].sqrt() * clean + (1 - alphas[index + 1]).sqrt() * eps
        return clean, gamma

    def _diffusion_loss(self, target: Tensor, noise_inputs: NoiseInputs) -> Tensor:
        return super()._diffusion_loss(target, noise_inputs) if self.denoising else target.new_zeros(())


@MODELS.register_module()
class VariantNeck(FeatureDiffusionNeck):
    """Neck with one :class:`Variant` per level."""

    part = Variant


def _to_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = next(g for g in (8, 4, 2, 1) if child.num_features % g == 0)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
        else:
            _to_group_norm(child)
