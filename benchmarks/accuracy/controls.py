"""Ablations of the preset ``plus``. Each of them changes one part, to find out which parts help.

Notation: Z is the aligned student feature and T is the teacher feature, (N, C, H, W) each. sg is the stop-gradient
operator.
"""

from typing import Optional

import torch
from torch import Tensor, nn

from benchmarks.accuracy.candidates import Bridge
from mmdiffkd.models import BottleneckDenoiser, FeatureDiffusion, FeatureDiffusionNeck, MSELoss
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Count, NonNegative, check_arguments


@MODELS.register_module()
class RampedMSELoss(MSELoss):
    """Mean squared error whose weight changes linearly over the first iterations.

    In iteration i, counted from 0, the weight is ``loss_weight * (start + (end - start) * min(1, i / length))``.
    ``length`` does not depend on the length of the training. Checkpoints contain i, so a resumed run continues with the
    same weight.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
        start (float): Factor of ``loss_weight`` in the first iteration. Defaults to 0.3.
        end (float): Factor of ``loss_weight`` after ``length`` iterations. Defaults to 1.5.
        length (int): Number of iterations in which the weight changes. Defaults to 400.
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

    A denoising step is x <- p x + q sg(eps(x)), where eps is the denoiser and the numbers p and q depend on the
    timestep only. The first sample is gamma Z plus noise. For a fixed gamma, the derivative of the last sample with
    respect to Z is therefore the same for all elements of an image: gamma times the product of p over all steps. The
    denoiser learns from the diffusion loss only.
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

    With this BatchNorm, the noise that the denoiser predicts has unit variance in each channel over the batch, for
    every input. The prediction for clean features also has unit variance, although they contain no noise to subtract.

    Args:
        channels (int): Latent channels, C.
        num_train_timesteps (int): Number of timestep embeddings. Defaults to 1000.
    """

    @check_arguments
    def __init__(self, channels: int, num_train_timesteps: int = 1000):
        super().__init__(channels, num_train_timesteps)
        del self.layers[-1]


class PlainRefinement(Bridge):
    """The preset ``plus`` with a refiner instead of the denoiser. The refiner uses neither noise nor timesteps.

    The refiner R has the denoiser's layers: two bottleneck blocks, a 1x1 convolution and a BatchNorm. ``loss_refiner``
    trains R to predict the teacher's feature T from sg(Z), where Z is the aligned student feature. A projection P (a
    convolution with BatchNorm) follows the refiner, as it follows the denoiser in DiffKD::

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
        """Predict the teacher's feature from the aligned student feature, (N, C, H, W) each."""
        return self.refiner(latent)

    def project(self, refined: Tensor) -> Tensor:
        """Map the refined feature to the feature that is compared with the teacher's feature, (N, C, H, W) each."""
        return self.proj(refined)


@MODELS.register_module()
class PlainRefinementNeck(FeatureDiffusionNeck):
    """Neck with one :class:`PlainRefinement` per level."""

    part = PlainRefinement
    denoises = False
    auxiliary_losses = ('loss_refiner',)
