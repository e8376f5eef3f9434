"""Ablations of the preset ``plus`` that change one part each, to find out which parts help.

Notation: Z is the aligned student feature and T is the teacher feature, (N, C, H, W) each. sg is the stop-gradient
operator.
"""

from typing import Optional

import torch
from torch import Tensor, nn

from benchmarks.accuracy.candidates import Bridge
from mmdiffkd.models import BottleneckDenoiser, FeatureDiffusion, FeatureDiffusionNeck, MSELoss
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.validation import Count, NonNegative, check_arguments


@MODELS.register_module()
class RampedMSELoss(MSELoss):
    """Mean squared error whose weight changes linearly over the first iterations.

    In iteration i, counted from 0, the weight is ``loss_weight * (start + (end - start) * min(1, i / length))``.
    ``length`` does not depend on the length of the training. Checkpoints contain the number of iterations.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
        start (float): Factor of the first iteration. Defaults to 0.3.
        end (float): Factor after ``length`` iterations. Defaults to 1.5.
        length (int): Number of iterations. Defaults to 400.
    """

    @check_arguments
    def __init__(
        self, loss_weight: NonNegative = 1.0, start: NonNegative = 0.3, end: NonNegative = 1.5, length: Count = 400
    ):
        super().__init__(loss_weight)
        self.start, self.end, self.length = start, end, length
        self.register_buffer('iteration', torch.zeros((), dtype=torch.long))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare tensors of the same shape and return a scalar. Each call in training mode counts as an iteration."""
        factor = self.start + (self.end - self.start) * (self.iteration / self.length).clamp(max=1)
        if self.training:
            self.iteration += 1
        return factor * super().forward(student, teacher)


class DetachedDiffusion(FeatureDiffusion):
    """DiffKD without the gradient of ``loss_kd`` through the denoiser, neither to its weights nor to the student.

    With the denoiser eps, each step is x <- p x + q sg(eps(x)). The derivative of the last sample with respect to Z is
    therefore the same for all elements: gamma times the product of the p of all steps. The denoiser learns from the
    diffusion loss only.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_grad_steps = 0


@MODELS.register_module()
class DetachedDiffusionNeck(FeatureDiffusionNeck):
    """Neck with one :class:`DetachedDiffusion` per level."""

    part = DetachedDiffusion


@MODELS.register_module()
class DenoiserWithoutLastNorm(BottleneckDenoiser):
    """The denoiser of the paper without its last BatchNorm.

    With this BatchNorm, the predicted noise has unit variance in each channel over the batch, for every input. This
    also holds for a clean feature, from which no noise should be subtracted.

    Args:
        channels (int): Latent channels, C.
        num_train_timesteps (int): Number of timestep embeddings. Defaults to 1000.
    """

    @check_arguments
    def __init__(self, channels: int, num_train_timesteps: int = 1000):
        super().__init__(channels, num_train_timesteps)
        del self.layers[-1]


class PlainRefinement(Bridge):
    """The preset ``plus`` with a refiner that has the denoiser's layers, but neither noise nor timesteps.

    The refiner R consists of two bottleneck blocks, a 1x1 convolution and a BatchNorm. ``loss_refiner`` trains R(sg(Z))
    to predict T. As after the denoiser in DiffKD, a projection P, a convolution with BatchNorm, follows the refiner::

        loss_kd = distance(P(Z + sg(R(Z) - Z)), T)

    Args:
        student_channels (int): Student channels, C_s.
        teacher_channels (int): Teacher channels, C.
        loss_kd (dict, optional): Config of the distance. The default type is ``MSELoss``.
    """

    def __init__(self, student_channels: int, teacher_channels: int, loss_kd: Optional[dict] = None):
        super().__init__(student_channels, teacher_channels, 'through', loss_kd)
        self.refiner = BottleneckDenoiser(teacher_channels).layers
        self.proj = nn.Sequential(nn.Conv2d(teacher_channels, teacher_channels, 1), nn.BatchNorm2d(teacher_channels))

    def refine(self, latent: Tensor) -> Tensor:
        """Map (N, C, H, W) to a prediction of T, (N, C, H, W)."""
        return self.refiner(latent)

    def project(self, refined: Tensor) -> Tensor:
        """Map the refined feature to the feature that is compared with T, (N, C, H, W)."""
        return self.proj(refined)


@MODELS.register_module()
class PlainRefinementNeck(FeatureDiffusionNeck):
    """Neck with one :class:`PlainRefinement` per level."""

    part = PlainRefinement
    denoises = False
    auxiliary_losses = ('loss_refiner',)
