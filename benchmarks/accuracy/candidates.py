"""Distillation methods that may replace the preset ``plus``.

Notation: Z is the aligned student feature and T is the teacher feature, (N, C, H, W) each. sg is the stop-gradient
operator. a_t is ``alphas_cumprod`` at timestep t; see :mod:`mmdiffkd.models.diffusion.schedulers`.
"""

from typing import Any, List, Literal, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.models import (
    Bottleneck,
    CrossKDNeck,
    DDIMScheduler,
    DiffusionOutput,
    DistillContext,
    DistillOutput,
    FeatureDiffusion,
    FeatureDiffusionNeck,
)
from mmdiffkd.models.losses.utils import normalize_channels
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Natural, NonNegative, build_part, check_arguments


class Bridge(FeatureDiffusion):
    """Regression bridge: a refiner R learns to predict the teacher's feature from the student's feature.

    Let Z be the aligned student feature, T the teacher's feature, and sg the stop-gradient operator. The refiner is
    R(Z) = Z + conv3x3(ReLU(conv3x3(Z))). Its last convolution is initialized to zero, so R starts as the identity. R is
    trained by this loss only::

        loss_refiner = mean((R(sg(Z)) - T)^2)

    ``pull`` selects ``loss_kd``, which trains the student. The gradients in the following list are those of ``loss_kd``
    with respect to Z, if the distance is a mean squared error with weight w over M elements:

    - ``'through'``: loss_kd = distance(Z + sg(R(Z) - Z), T). The gradient 2w/M (R(Z) - T) is proportional to the part
      of the error Z - T that R cannot predict from Z. The gradient bypasses R and reaches Z unchanged.
    - ``'refined'``: loss_kd = distance(Z, sg(R(Z))). The gradient 2w/M (Z - R(Z)) is proportional to the part of the
      error Z - T that R can predict. The sum of this gradient and the gradient of ``'through'`` is the gradient of the
      plain distance(Z, T).
    - ``'teacher'``: loss_kd = distance(Z, T) sg(|R(Z) - T| / |Z - T|), with Euclidean norms. The gradient
      2w/M (Z - T) |R(Z) - T| / |Z - T| is the gradient of the plain distance(Z, T), scaled to the norm of the gradient
      of ``'through'``.

    Args:
        student_channels (int): Student channels, C_s.
        teacher_channels (int): Teacher channels, C.
        pull (str): ``'through'``, ``'refined'`` or ``'teacher'``; see above.
        loss_kd (dict, optional): Config of the distance. The default type is ``MSELoss``.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        pull: Literal['through', 'refined', 'teacher'],
        loss_kd: Optional[dict] = None,
    ):
        super().__init__(student_channels, teacher_channels, denoise=False, loss_kd=loss_kd)
        self.pull = pull
        self.refiner = _conv_relu_conv(teacher_channels)
        nn.init.zeros_(self.refiner[-1].weight)
        nn.init.zeros_(self.refiner[-1].bias)

    def forward(
        self, student: Tensor, teacher: Tensor, noise_inputs=None, mask: Optional[Tensor] = None, **kwargs
    ) -> DiffusionOutput:
        """Compare student features, (N, C_s, H', W'), with teacher features, (N, C, H, W)."""
        latent, target = self._align(student, teacher.shape[-2:]), teacher.detach()
        refined = self.refine(latent.detach())
        losses = dict(loss_refiner=F.mse_loss(refined, target))
        refined = refined.detach()
        if self.pull == 'through':
            compared = self.project(_PassGradient.apply(latent, refined))
            losses['loss_kd'] = self._distance(compared, target, mask, None)
        elif self.pull == 'refined':
            losses['loss_kd'] = self._distance(latent, refined, mask, None)
        else:
            ratio = (refined - target).norm() / (latent.detach() - target).norm().clamp(min=1e-6)
            losses['loss_kd'] = ratio * self._distance(latent, target, mask, None)
        return DiffusionOutput(losses, None, refined, target, latent)

    def refine(self, latent: Tensor) -> Tensor:
        """Predict the teacher's feature from the aligned student feature, (N, C, H, W) each."""
        return latent + self.refiner(latent)

    def project(self, refined: Tensor) -> Tensor:
        """Map the refined feature to the feature that is compared with the teacher's feature, (N, C, H, W) each."""
        return refined


class _PassGradient(torch.autograd.Function):
    """Straight-through estimator: return the second tensor, R(Z), but pass the gradient to the first tensor, Z.

    This is Z + sg(R(Z) - Z) without the rounding errors of the difference and the sum.
    """

    @staticmethod
    def forward(ctx, latent: Tensor, refined: Tensor) -> Tensor:
        return refined.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


@MODELS.register_module()
class BridgeNeck(FeatureDiffusionNeck):
    """Neck with one :class:`Bridge` per level."""

    part = Bridge
    denoises = False
    auxiliary_losses = ('loss_refiner',)


class NoisyGeneration(FeatureDiffusion):
    """Generate the teacher's feature from a noisy student feature. Training cannot change the noise level.

    Every channel of the aligned student feature Z is standardized over batch and positions, without learned parameters,
    so that the student cannot raise its signal above the noise. For each image, the timestep t is drawn uniformly from
    0 to ``max_timestep``. The noise eps is standard normal, and T is the teacher's feature::

        x = sqrt(a_t) standardize(Z) + sqrt(1 - a_t) eps
        loss_kd = distance(conv3x3(ReLU(conv3x3(x))), T)

    There is neither a diffusion loss nor a noise adapter. The standard deviation of the noise, sqrt(1 - a_t), is 0.01
    at t = 0, 0.32 at t = 100 and 0.78 at t = 300. With ``max_timestep=0``, there is almost no noise.

    Args:
        student_channels (int): Student channels, C_s.
        teacher_channels (int): Teacher channels, C.
        max_timestep (int): Largest timestep.
        loss_kd (dict, optional): Config of the distance. The default type is ``MSELoss``.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, max_timestep: Natural, loss_kd: Optional[dict] = None
    ):
        super().__init__(student_channels, teacher_channels, denoise=False, loss_kd=loss_kd)
        self.max_timestep = max_timestep
        self.scheduler = DDIMScheduler()
        self.generation = _conv_relu_conv(teacher_channels)

    def _align(self, student: Tensor, size: torch.Size) -> Tensor:
        latent = normalize_channels(super()._align(student, size))
        timesteps = torch.randint(self.max_timestep + 1, (len(latent),), device=latent.device)
        return self.generation(self.scheduler.add_noise(latent, torch.randn_like(latent), timesteps))


@MODELS.register_module()
class NoisyGenerationNeck(FeatureDiffusionNeck):
    """Neck with one :class:`NoisyGeneration` per level."""

    part = NoisyGeneration
    denoises = False


class SkipDiffusion(FeatureDiffusion):
    """DiffKD with a denoiser that is conditioned on the student's feature and on the noise level.

    The denoiser returns a clean feature unchanged.

    The aligned student feature Z and the teacher's feature T are standardized per channel, without learned parameters,
    so that signal and noise have unit variance. The noise adapter predicts gamma, which sets the share s of Z and the
    share r of the noise eps in the noisy feature x. With these shares, x has unit variance, as in the training of the
    denoiser::

        x = s Z + r eps,   s = gamma / n,   r = (1 - gamma) / n,   n = sqrt(gamma^2 + (1 - gamma)^2)

    The denoiser D predicts the clean feature x_0 in a single pass from the noisy feature x, a condition c and the share
    s. The condition is the student's feature. G is a network, and the timestep t(s) is the first timestep with
    a_t <= s^2::

        D(x, c, s) = s x + sqrt(1 - s^2) G([x, c], t(s))
        loss_kd = distance(D(x, Z, s), T)
        loss_diffusion = mean((D(sqrt(a_t) T + sqrt(1 - a_t) eps, sg(Z), sqrt(a_t)) - T)^2),  t uniform

    This form of D means that G predicts -v, the negative of the v-prediction. The last layer of G has no BatchNorm and
    is initialized to zero. With gamma = 1, D returns Z unchanged, and ``loss_kd`` with MSE is twice the loss of PKD.

    Args:
        student_channels (int): Student channels, C_s.
        teacher_channels (int): Teacher channels, C.
        noise_adapter (dict, optional): Config of the noise adapter. The default type is ``NoiseAdapter``.
        loss_kd (dict, optional): Config of the distance. The default type is ``MSELoss``.
        loss_diffusion_weight (float): Weight of the diffusion loss. Defaults to 1.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        noise_adapter: Optional[dict] = None,
        loss_kd: Optional[dict] = None,
        loss_diffusion_weight: NonNegative = 1.0,
    ):
        super().__init__(
            student_channels,
            teacher_channels,
            denoise=False,
            loss_kd=loss_kd,
            loss_diffusion_weight=loss_diffusion_weight,
        )
        channels = teacher_channels
        self.scheduler = DDIMScheduler()
        self.noise_adapter = build_part(
            MODELS, noise_adapter or {}, 'noise_adapter', 'mmdiffkd.NoiseAdapter', channels=channels
        )
        self.time_embedding = nn.Embedding(self.scheduler.num_train_timesteps, channels)
        self.merge = nn.Conv2d(2 * channels, channels, 1)
        self.layers = nn.Sequential(
            Bottleneck(channels, 4), Bottleneck(channels, 4), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self, student: Tensor, teacher: Tensor, noise_inputs=None, mask: Optional[Tensor] = None, **kwargs
    ) -> DiffusionOutput:
        """Compare student features, (N, C_s, H', W'), with teacher features, (N, C, H, W)."""
        latent = normalize_channels(self._align(student, teacher.shape[-2:]))
        target = normalize_channels(teacher.detach())
        gamma = self.noise_adapter(latent)
        size = (gamma.square() + (1 - gamma).square()).sqrt()
        signal, noise = (share.view(-1, 1, 1, 1) for share in (gamma / size, (1 - gamma) / size))
        noisy = signal * latent + noise * torch.randn_like(latent)
        denoised = self.denoise_once(noisy, latent, signal, noise)
        losses = dict(loss_kd=self._distance(denoised, target, mask, None))
        losses['loss_diffusion'] = self.loss_diffusion_weight * self._diffusion_loss(target, latent.detach())
        return DiffusionOutput(losses, gamma, denoised, target, latent)

    def denoise_once(self, noisy: Tensor, condition: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Predict the clean feature x_0.

        Args:
            noisy (Tensor): The noisy feature x, (N, C, H, W).
            condition (Tensor): The condition c, (N, C, H, W).
            signal (Tensor): s, the share of x_0 in x, (N, 1, 1, 1).
            noise (Tensor): sqrt(1 - s^2), the share of the noise in x, (N, 1, 1, 1).

        Returns:
            Tensor: D(x, c, s), (N, C, H, W).
        """
        table = self.scheduler.alphas_cumprod
        timesteps = (table > signal.detach().square().view(-1, 1)).sum(dim=1).clamp(max=len(table) - 1)
        merged = self.merge(torch.cat([noisy, condition], dim=1)) + self.time_embedding(timesteps)[..., None, None]
        return signal * noisy + noise * self.layers(merged)

    def _diffusion_loss(self, target: Tensor, condition: Tensor) -> Tensor:
        timesteps = self.scheduler.sample_timesteps(len(target), target.device)
        alphas = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
        noisy = signal * target + noise * torch.randn_like(target)
        return F.mse_loss(self.denoise_once(noisy, condition, signal, noise), target)


@MODELS.register_module()
class SkipDiffusionNeck(FeatureDiffusionNeck):
    """Neck with one :class:`SkipDiffusion` per level."""

    part = SkipDiffusion
    denoises = False


@MODELS.register_module()
class HeadJudgeNeck(CrossKDNeck):
    """CrossKD for the student's neck: the teacher's whole head runs on student features with the teacher's statistics.

    A 1x1 convolution, which all levels share, maps the student's features to features Z with C channels. On each level,
    every channel of Z is rescaled to the mean and the standard deviation of the same channel of the teacher's feature
    T, over batch and positions::

        Y = std(T) standardize(Z) + mean(T)

    The teacher's frozen head runs on Y. ``loss_cls`` and ``loss_reg`` compare its outputs for Y with its outputs for T,
    as in :class:`CrossKDNeck`. ``loss_feature`` is the distance between Y and T. It also reduces differences between Y
    and T that hardly change the outputs of the head.

    There are three taps per model: ``student=['neck'] * 3`` and ``teacher=['bbox_head.retina_cls',
    'bbox_head.retina_reg', 'neck']``.

    Args:
        student_channels (list[list[int]]): Student channels per tap and level.
        teacher_channels (list[list[int]]): Teacher channels per tap and level.
        num_convs (int): Number of convolutions in a branch of the teacher's head.
        loss_feature (dict): Config of the distance between the features.
        cls_weight (float): Weight of the class loss. Defaults to 1.
        reg_weight (float): Weight of the box loss. Defaults to 1.
    """

    @check_arguments
    def __init__(
        self,
        student_channels: Sequence[Any],
        teacher_channels: Sequence[Any],
        num_convs: Natural,
        loss_feature: dict,
        cls_weight: NonNegative = 1.0,
        reg_weight: NonNegative = 1.0,
    ):
        super().__init__(
            student_channels[:2], teacher_channels[:2], num_convs, cls_weight=cls_weight, reg_weight=reg_weight
        )
        self.adapter = nn.Conv2d(student_channels[2][0], teacher_channels[2][0], 1)
        self.loss_feature = build_part(MODELS, loss_feature, 'loss_feature')

    def forward(
        self, student: List[List[Tensor]], teacher: List[List[Tensor]], context: DistillContext
    ) -> List[DistillOutput]:
        """Compare the features of both models, and the predictions of the teacher's head for these features.

        Args:
            student (list[list[Tensor]]): The features of the neck three times, (N, C_s, H, W) per level.
            teacher (list[list[Tensor]]): Outputs of the teacher's class layer and box layer, and the features of its
                neck, (N, C, H, W) per level.
            context (DistillContext): Context of the iteration. It must contain the teacher.

        Returns:
            list[DistillOutput]: ``loss_cls``, ``loss_reg`` and ``loss_feature`` per level.
        """
        *predictions, features = teacher
        judged = [rescale_channels(self.adapter(ours), theirs) for ours, theirs in zip(student[2], features)]
        outputs = super().forward([judged, judged], predictions, context)
        for output, ours, theirs in zip(outputs, judged, features):
            output.losses['loss_feature'] = self.loss_feature(ours, theirs)
        return outputs


def rescale_channels(feature: Tensor, other: Tensor) -> Tensor:
    """Rescale each channel of a feature, (N, C, H, W), to mean and standard deviation of the same channel of ``other``.

    The statistics are computed over batch and positions.
    """
    std, mean = torch.std_mean(other, dim=(0, 2, 3), unbiased=False, keepdim=True)
    return normalize_channels(feature) * std + mean


def _conv_relu_conv(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )
