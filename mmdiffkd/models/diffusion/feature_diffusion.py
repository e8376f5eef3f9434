"""DiffKD for one level of features: alignment, autoencoder, denoising, distance and losses (paper, section 3)."""

import copy
from contextlib import nullcontext
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import (
    Channels,
    ConfigError,
    NonNegative,
    build_part,
    check_arguments,
    in_key,
    one_line,
)

from .autoencoder import LinearAutoencoder

try:
    from torch.compiler import is_compiling
except ImportError:  # torch before 2.3
    from torch._dynamo.external_utils import is_compiling


class NoiseInputs(NamedTuple):
    """Noise and timesteps to use in one forward pass. A field that is None is replaced by random values.

    Attributes:
        adapter_noise (Tensor, optional): Noise blended into the student latent, (N, C, H, W).
        diffusion_noise (Tensor, optional): Noise of the diffusion loss, (N, C, H, W).
        diffusion_timesteps (Tensor, optional): Timesteps of the diffusion loss, integers, (N, ).
    """

    adapter_noise: Optional[Tensor] = None
    diffusion_noise: Optional[Tensor] = None
    diffusion_timesteps: Optional[Tensor] = None


class DiffusionOutput(NamedTuple):
    """Losses and features of one forward pass.

    Attributes:
        losses (dict[str, Tensor]): Weighted scalars: ``loss_kd``; ``loss_diffusion`` if denoising is enabled;
            ``loss_reconstruction`` if there is an autoencoder.
        gamma (Tensor, optional): Share of each student latent that is kept when noise is blended in, (N, ). None if
            denoising is disabled.
        denoised (Tensor): Denoised student latent, the input of ``loss_kd``, (N, C, H, W).
        teacher_latent (Tensor): Detached teacher latent, the target of ``loss_kd``, (N, C, H, W).
        student_latent (Tensor): Aligned student features before noise and denoising, (N, C, H, W).
        trajectory (list[Tensor]): The noisy student latent and the result of every denoising step, (N, C, H, W) each.
            Empty if ``return_trajectory`` is False or denoising is disabled.
    """

    losses: Dict[str, Tensor]
    gamma: Optional[Tensor]
    denoised: Tensor
    teacher_latent: Tensor
    student_latent: Tensor
    trajectory: Sequence[Tensor] = ()

    @property
    def logs(self) -> Dict[str, Tensor]:
        """Values to log: gamma, if denoising is enabled."""
        return {} if self.gamma is None else dict(gamma=self.gamma)


class FeatureDiffusion(nn.Module):
    """DiffKD for one pair of student and teacher feature maps (paper, section 3).

    Args:
        student_channels (int): Student channels, C_s.
        teacher_channels (int): Teacher channels, C_t.
        latent_channels (int, optional): Latent channels C of a linear autoencoder on the teacher features. None
            disables the autoencoder, and C equals C_t. Defaults to None.
        denoise (bool): Whether to denoise the student features. False compares the aligned features directly. Defaults
            to True.
        align (bool): Whether a 1x1 convolution maps the student features to C channels. False requires
            ``denoise=False``. Defaults to True.
        denoiser (dict, optional): Config of the denoiser, which receives features in channels-last memory format. The
            default type is ``BottleneckDenoiser``.
        noise_adapter (dict, optional): Config of the noise adapter. The default type is ``NoiseAdapter``.
        scheduler (dict, optional): Config of the noise scheduler. The default type is ``DDIMScheduler``.
        loss_kd (dict, optional): Config of the distillation loss, called as ``loss_kd(student, teacher)``. The default
            type is ``MSELoss``.
        loss_diffusion_weight (float): Weight of the diffusion loss. Defaults to 1.
        loss_reconstruction_weight (float): Weight of the autoencoder's reconstruction loss. Defaults to 1.
        num_grad_steps (int, optional): Number of denoising steps, counted from the last step, in which ``loss_kd`` is
            backpropagated through the denoiser. In earlier steps, the denoiser's prediction is detached, and the
            gradient flows through the noisy sample only. None means all steps, as in the paper. Defaults to None.
        memory_efficient (bool): Whether to save only the inputs of denoiser, noise adapter and projection for the
            backward pass, and recompute their activations (activation checkpointing). Results and gradients are
            unchanged. Under ``torch.compile``, this has no effect: the compiler chooses the activations to save.
            Defaults to True.

    Raises:
        ValueError: If a value is invalid or conflicts with another argument; if ``loss_kd`` compares classes, but
            student and teacher have different numbers of classes or a single channel; or if the loss, the scheduler,
            the noise adapter or the denoiser fails a test on random features (``try_loss``,
            ``try_diffusion``).
    """

    @check_arguments
    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        latent_channels: Optional[Channels] = None,
        denoise: bool = True,
        align: bool = True,
        denoiser: Optional[dict] = None,
        noise_adapter: Optional[dict] = None,
        scheduler: Optional[dict] = None,
        loss_kd: Optional[dict] = None,
        loss_diffusion_weight: NonNegative = 1.0,
        loss_reconstruction_weight: NonNegative = 1.0,
        num_grad_steps: Optional[int] = None,
        memory_efficient: bool = True,
    ):
        super().__init__()
        parts = dict(denoiser=denoiser, noise_adapter=noise_adapter, scheduler=scheduler)
        for name, value in dict(latent_channels=latent_channels, num_grad_steps=num_grad_steps, **parts).items():
            if not denoise and value is not None:
                raise ConfigError(name, f'={value} has no effect with denoise=False; remove it.')
        if denoise and not align:
            raise ConfigError('align', '=False needs denoise=False: the denoiser needs aligned student features.')
        self.loss_kd = build_part(MODELS, loss_kd or {}, 'loss_kd', 'mmdiffkd.MSELoss')
        if not align and student_channels != teacher_channels and getattr(self.loss_kd, 'compares_channels', True):
            raise ConfigError(
                'align',
                f'=False compares features without an adapter, but the student has {student_channels} channels and the '
                f'teacher has {teacher_channels}; set align=True.',
            )
        channels = latent_channels or teacher_channels
        self.denoise = denoise
        self.memory_efficient = memory_efficient
        self.loss_diffusion_weight = loss_diffusion_weight
        self.loss_reconstruction_weight = loss_reconstruction_weight
        self.align = nn.Conv2d(student_channels, channels, 1) if align else nn.Identity()
        if getattr(self.loss_kd, 'compares_classes', False):
            self._check_classes(student_channels, teacher_channels)
        try_loss(self.loss_kd, channels, loss_kd or {})
        if not denoise:
            return
        self.scheduler = build_part(MODELS, scheduler or {}, 'scheduler', 'mmdiffkd.DDIMScheduler')
        num_steps = len(self.scheduler.timesteps)
        self.num_grad_steps = num_steps if num_grad_steps is None else num_grad_steps
        if not 1 <= self.num_grad_steps <= num_steps:
            raise ConfigError(
                'num_grad_steps',
                f'={num_grad_steps} must be between 1 and scheduler.num_inference_steps={num_steps}.',
            )
        self.autoencoder = None if latent_channels is None else LinearAutoencoder(teacher_channels, channels)
        self.noise_adapter = build_part(
            MODELS, noise_adapter or {}, 'noise_adapter', 'mmdiffkd.NoiseAdapter', channels=channels
        )
        self.denoiser = build_part(
            MODELS,
            denoiser or {},
            'denoiser',
            'mmdiffkd.BottleneckDenoiser',
            channels=channels,
            num_train_timesteps=self.scheduler.num_train_timesteps,
        )
        try_diffusion(self.scheduler, self.noise_adapter, self.denoiser, channels)
        self.proj = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def describe(self) -> dict:
        """Return the settings of this level; see :meth:`.DistillNeck.describe`."""
        settings = dict(
            adapter=None,
            latent_channels=None,
            autoencoder=False,
            denoiser=None,
            steps=None,
            loss_kd=type(self.loss_kd).__name__,
            loss_weight=getattr(self.loss_kd, 'loss_weight', None),
            loss_diffusion_weight=None,
            loss_reconstruction_weight=None,
        )
        if isinstance(self.align, nn.Conv2d):
            settings['adapter'] = f'{self.align.in_channels} -> {self.align.out_channels}'
        if self.denoise:
            settings.update(
                latent_channels=self.proj[0].out_channels,
                denoiser=type(self.denoiser).__name__,
                steps=list(self.scheduler.timesteps),
                loss_diffusion_weight=self.loss_diffusion_weight,
            )
            if self.autoencoder is not None:
                settings.update(autoencoder=True, loss_reconstruction_weight=self.loss_reconstruction_weight)
        return settings

    def _check_classes(self, student: int, teacher: int) -> None:
        name = type(self.loss_kd).__name__
        if student != teacher:
            raise ConfigError(
                'loss_kd',
                f': {name} compares class by class, but the student has {student} classes and the teacher {teacher}; '
                "tap features instead, such as dict(student='backbone', teacher='backbone').",
            )
        if student == 1:
            raise ConfigError(
                'loss_kd',
                f': {name} compares distributions over classes, but there is only one channel; use a loss for '
                "features, such as dict(type='mmdiffkd.MSELoss').",
            )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        noise_inputs: Optional[NoiseInputs] = None,
        mask: Optional[Tensor] = None,
        return_trajectory: bool = False,
        labels: Optional[Tensor] = None,
    ) -> DiffusionOutput:
        """Compare student features with teacher features.

        Args:
            student (Tensor): Student features, (N, C_s, H, W), which are resized to the teacher's height and width.
            teacher (Tensor): Teacher features, (N, C_t, H', W'). If the student features are pooled (1x1), the teacher
                features are averaged over their positions.
            noise_inputs (NoiseInputs, optional): Noise and timesteps to use instead of random ones. Defaults to None.
            mask (Tensor, optional): Mask of valid pixels, (N, 1, h, w) of type bool, which is resized to the teacher
                features. Only losses with ``takes_mask = True`` use the mask: ``loss_kd(student, teacher, mask)``. None
                uses all pixels. Defaults to None.
            return_trajectory (bool): Whether to fill ``trajectory`` of the output. Defaults to False.
            labels (Tensor, optional): Classes of the images, (N, ), for losses with ``takes_labels = True``:
                ``loss_kd(student, teacher, labels)``. Defaults to None.

        Returns:
            DiffusionOutput: Losses, gamma and features.

        Raises:
            ValueError: If the batch sizes differ.
        """
        if student.size(0) != teacher.size(0):
            raise ValueError(
                f'Student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same batch size.'
            )
        if student.shape[-2:] == (1, 1):
            teacher = teacher.mean(dim=(2, 3), keepdim=True)
        if self.training and teacher[:, 0].numel() == 1 and not self._syncs_ranks():
            # batch statistics need more than one value per channel: use the running statistics
            in_training = [module for module in self.modules() if module.training]
            self.eval()
            try:
                return self.forward(student, teacher, noise_inputs, mask, return_trajectory, labels)
            finally:
                for module in in_training:  # frozen modules stay in eval mode
                    module.training = True
        if self.denoise:  # channels-last is the fastest layout for the denoiser's convolutions and BatchNorm
            student = student.contiguous(memory_format=torch.channels_last)
            teacher = teacher.contiguous(memory_format=torch.channels_last)
        noise_inputs = noise_inputs or NoiseInputs()
        latent = self._align(student, teacher.shape[-2:])
        target = teacher.detach()
        if not self.denoise:
            losses = dict(loss_kd=self._distance(latent, target, mask, labels))
            return DiffusionOutput(losses, None, latent, target, latent)

        losses = {}
        if self.autoencoder is not None:
            target, reconstruction = self.autoencoder(target)
            loss = F.mse_loss(reconstruction.float(), teacher.detach().float())
            losses['loss_reconstruction'] = self.loss_reconstruction_weight * loss
            target = target.detach()
        samples: List[Tensor] = []
        clean, gamma = self._denoise(latent, noise_inputs.adapter_noise, samples if return_trajectory else None)
        denoised = self._run(self.proj, clean)
        losses['loss_diffusion'] = self.loss_diffusion_weight * self._diffusion_loss(target, noise_inputs)
        losses['loss_kd'] = self._distance(denoised, target, mask, labels)
        return DiffusionOutput(losses, gamma, denoised, target, latent, samples)

    def _syncs_ranks(self) -> bool:
        """Return whether SyncBatchNorm computes statistics over several ranks; then all ranks must take part."""
        return get_world_size() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in self.modules())

    def _align(self, student: Tensor, size: torch.Size) -> Tensor:
        latent = self.align(student)
        if latent.shape[-2:] == size:
            return latent
        if size == (1, 1):  # interpolation would use the center pixels only
            return latent.mean(dim=(2, 3), keepdim=True)
        return F.interpolate(latent, size, mode='bilinear', align_corners=False)

    def _distance(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor], labels: Optional[Tensor]) -> Tensor:
        # contiguous, because some losses call view()
        student, teacher = student.float().contiguous(), teacher.float().contiguous()
        if getattr(self.loss_kd, 'takes_labels', False):
            return self.loss_kd(student, teacher, labels)
        if mask is None or not getattr(self.loss_kd, 'takes_mask', False):
            return self.loss_kd(student, teacher)
        mask = F.interpolate(mask.float(), teacher.shape[-2:], mode='nearest-exact')[:, 0] > 0
        return self.loss_kd(student, teacher, mask)

    def _denoise(
        self, latent: Tensor, noise: Optional[Tensor], samples: Optional[List[Tensor]]
    ) -> Tuple[Tensor, Tensor]:
        """Blend noise into the student latent (equation 8), then denoise it; append each step to ``samples``."""
        gamma = self._run(self.noise_adapter, latent)
        if noise is None:
            noise = _randn_like(latent)
        sample = torch.lerp(noise, latent.float(), gamma.view(-1, 1, 1, 1))
        if samples is not None:
            samples.append(sample)
        for index, timestep in enumerate(self.scheduler.timesteps):
            # one timestep for the whole batch, so the timestep embedding is computed once
            timesteps = torch.full((1,), timestep, dtype=torch.long, device=latent.device)
            predicted = self._run(self.denoiser, sample, timesteps)
            if index < len(self.scheduler.timesteps) - self.num_grad_steps:
                # detach() instead of no_grad(): autocast caches the weights that it casts, and weights cast under
                # no_grad() would have no gradient in the later steps
                predicted = predicted.detach()
            sample = self.scheduler.step(predicted, timestep, sample)
            if samples is not None:
                samples.append(sample)
        return sample, gamma

    def _diffusion_loss(self, target: Tensor, noise_inputs: NoiseInputs) -> Tensor:
        """Compute the loss that trains the denoiser on the teacher latent."""
        noise, timesteps = noise_inputs.diffusion_noise, noise_inputs.diffusion_timesteps
        if noise is None:
            noise = _randn_like(target)
        if timesteps is None:
            timesteps = self.scheduler.sample_timesteps(target.size(0), target.device)
        noisy = self.scheduler.add_noise(target, noise, timesteps)
        prediction_target = self.scheduler.target(target, noise, timesteps)
        return (self._run(self.denoiser, noisy, timesteps).float() - prediction_target).square().mean()

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Call a module. In training, use activation checkpointing if ``memory_efficient`` is set."""
        if not (self.memory_efficient and self.training and torch.is_grad_enabled()) or is_compiling():
            return module(*inputs)
        contexts = nullcontext(), _FrozenStatistics(module)  # one for the forward pass, one for the recomputation
        return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: contexts)


class _FrozenStatistics:
    """Context that leaves BatchNorm's running statistics unchanged while the backward pass recomputes a module.

    The forward pass has updated the statistics already, so the recomputation must not update them again. Every backward
    pass through the same graph enters the context, so it must be reusable.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        norms = [norm for norm in self.module.modules() if isinstance(norm, _BatchNorm) and norm.training]
        norms = [norm for norm in norms if norm.track_running_stats]
        self.saved = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0

    def __exit__(self, *error):
        for norm, momentum, count in self.saved:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def try_loss(loss_kd: nn.Module, channels: int, cfg: dict) -> None:
    """Run a distillation loss forward and backward on random features.

    Args:
        loss_kd (Module): The loss.
        channels (int): Number of channels.
        cfg (dict): Config of the loss, for the error message.

    Raises:
        ValueError: If the loss fails, is not a scalar, is negative or not finite, has no gradient, or uses only four
            channels, as losses for boxes do.
    """
    settings = ', '.join(f'{key}={value!r}' for key, value in cfg.items() if key != 'type')
    name = f'{type(loss_kd).__name__}({settings})'
    with in_key('loss_kd'), torch.random.fork_rng(devices=[]), torch.enable_grad():
        # the width is not 4: losses for boxes take (..., 4), so they fail here
        student, teacher = torch.randn(2, 2, channels, 6, 5).unbind()
        loss, gradient = _try_loss_on(loss_kd, student, teacher, name)
        if loss.is_meta:
            return
        # The loss must not be negative for values around -5 either, because class scores of detectors are in this
        # range. Features are not in this range, so the loss may be non-finite here.
        scores, _ = _try_loss_on(loss_kd, student - 5, teacher - 5, name)
        lowest = min(loss, scores) if scores.isfinite() else loss
        if not (loss.isfinite() and lowest >= -1e-6):
            raise ConfigError(
                '', f': {name} is {lowest.item():g} for random features; it must be finite and not negative.'
            )
        used = gradient.ne(0).sum((0, 2, 3)).count_nonzero().item()
        if used == 4 < channels:
            raise ConfigError(
                '', f': {name} compares 4 of {channels} channels, as losses for boxes do; use a loss for features.'
            )


def _try_loss_on(loss_kd: nn.Module, student: Tensor, teacher: Tensor, name: str) -> Tuple[Tensor, Tensor]:
    """Return the loss between two features, and its gradient with respect to the student's feature."""
    student = student.detach().requires_grad_()
    try:
        labels = [torch.zeros(2, dtype=torch.long)] if getattr(loss_kd, 'takes_labels', False) else []
        loss = copy.deepcopy(loss_kd)(student, teacher, *labels)  # a loss can have buffers: copy
        (gradient,) = torch.autograd.grad(loss, student)
    except Exception as error:
        raise ConfigError('', f': {name} does not run on random features: {one_line(error)}') from error
    return loss.detach(), gradient


def try_diffusion(scheduler: nn.Module, noise_adapter: nn.Module, denoiser: nn.Module, channels: int) -> None:
    """Run a noise adapter, a scheduler and a denoiser on random features, and check their results.

    Raises:
        ValueError: If a module fails, if it returns a tensor of the wrong shape or with non-finite values, or if gamma
            is not between 0 and 1.
    """
    # eval() is called on copies, so that the modules themselves stay in training mode
    noise_adapter, denoiser = (copy.deepcopy(part).eval() for part in (noise_adapter, denoiser))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        latent, noise = torch.randn(2, 2, channels, 4, 4).unbind()
        gamma = _try_part('noise_adapter', latent.shape[:1], noise_adapter, latent)
        if not gamma.is_meta and not ((gamma >= 0) & (gamma <= 1)).all():
            raise ConfigError('noise_adapter', f': gamma is {gamma.tolist()}; it must be between 0 and 1.')
        timesteps = _try_part('scheduler', latent.shape[:1], scheduler.sample_timesteps, 2, latent.device)
        noisy = _try_part('scheduler', latent.shape, scheduler.add_noise, latent, noise, timesteps)
        _try_part('scheduler', latent.shape, scheduler.target, latent, noise, timesteps)
        predicted = _try_part('denoiser', latent.shape, denoiser, noisy, timesteps)
        _try_part('scheduler', latent.shape, scheduler.step, predicted, scheduler.timesteps[0], noisy)


def _try_part(key: str, shape: torch.Size, function, *args) -> Tensor:
    name = getattr(function, '__qualname__', type(function).__name__)
    try:
        result = function(*args)
    except Exception as error:
        raise ConfigError(key, f': {name} does not run on random features: {one_line(error)}') from error
    found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if found != tuple(shape):
        raise ConfigError(key, f': {name} returns {found} instead of a tensor of shape {tuple(shape)}.')
    if not result.is_meta and not result.isfinite().all():
        raise ConfigError(key, f': {name} returns values that are not finite for random features.')
    return result


def _randn_like(x: Tensor) -> Tensor:
    """Draw float32 noise of the shape of ``x`` in channels-last memory format, the faster layout for convolutions."""
    n, c, h, w = x.shape
    return torch.randn(n, h, w, c, device=x.device).permute(0, 3, 1, 2)
