from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from .autoencoder import LinearAutoencoder
from .recompute import ConvChain


class NoiseInputs(NamedTuple):
    """Noise and timesteps of one forward pass; fields that are None are sampled.

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
        losses (dict[str, Tensor]): Weighted scalars: ``loss_kd``, with denoising ``loss_diffusion``, and with an
            autoencoder ``loss_reconstruction``.
        gamma (Tensor, optional): Share of the student latent that is kept, (N, ); None without denoising.
        denoised (Tensor): Denoised student latent, the input of ``loss_kd``, (N, C, H, W).
        teacher_latent (Tensor): Detached teacher latent, the target of ``loss_kd``, (N, C, H, W).
        student_latent (Tensor): Aligned student features before noise and denoising, (N, C, H, W).
        trajectory (list[Tensor]): With ``return_trajectory``, the noised latent and the result of every denoising
            step, (N, C, H, W) each; empty without denoising.
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
        denoiser (dict, optional): Config of the denoiser, which receives channels-last features. Defaults to
            ``BottleneckDenoiser``.
        noise_adapter (dict, optional): Config of the noise adapter. Defaults to ``NoiseAdapter``.
        scheduler (dict, optional): Config of the noise scheduler. Defaults to ``DDIMScheduler``.
        loss_kd (dict, optional): Config of the distillation loss, called as ``loss_kd(student, teacher)``. Defaults to
            ``MSELoss``.
        loss_diffusion_weight (float): Weight of the diffusion loss. Defaults to 1.
        loss_reconstruction_weight (float): Weight of the autoencoder's loss. Defaults to 1.
        num_grad_steps (int, optional): Number of final denoising steps whose denoiser backpropagates ``loss_kd``. In
            earlier steps, the gradient bypasses the denoiser and is only scaled like the sample. None backpropagates
            through the denoiser in all steps, as in the paper. Defaults to None.
        memory_efficient (bool): Save only the inputs of the convolution chains for the backward pass, which recomputes
            the rest. Results and gradients are unchanged. Defaults to False.

    Raises:
        ValueError: If ``align``, ``latent_channels``, ``num_grad_steps`` or ``memory_efficient`` conflict with the
            other arguments, or ``loss_kd`` compares classes and their numbers differ or are 1.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        latent_channels: Optional[int] = None,
        denoise: bool = True,
        align: bool = True,
        denoiser: Optional[dict] = None,
        noise_adapter: Optional[dict] = None,
        scheduler: Optional[dict] = None,
        loss_kd: Optional[dict] = None,
        loss_diffusion_weight: float = 1.0,
        loss_reconstruction_weight: float = 1.0,
        num_grad_steps: Optional[int] = None,
        memory_efficient: bool = False,
    ):
        super().__init__()
        of_denoising = dict(
            latent_channels=latent_channels, num_grad_steps=num_grad_steps, memory_efficient=memory_efficient or None
        )
        for name, value in of_denoising.items():
            if not denoise and value is not None:
                raise ValueError(f'{name}={value} has no effect with denoise=False; remove it.')
        if denoise and not align:
            raise ValueError('align=False needs denoise=False: the denoiser needs aligned student features.')
        if not align and student_channels != teacher_channels:
            raise ValueError(
                f'align=False compares features as they are, but the student has {student_channels} channels and '
                f'the teacher {teacher_channels}; set align=True.'
            )
        channels = latent_channels or teacher_channels
        self.denoise = denoise
        self.loss_diffusion_weight = loss_diffusion_weight
        self.loss_reconstruction_weight = loss_reconstruction_weight
        self.align = nn.Conv2d(student_channels, channels, 1) if align else nn.Identity()
        self.loss_kd = MODELS.build(loss_kd or dict(type='mmdiffkd.MSELoss'))
        if getattr(self.loss_kd, 'compares_classes', False):
            self._check_classes(student_channels, teacher_channels)
        if not denoise:
            return
        self.scheduler = MODELS.build(scheduler or {}, default_args=dict(type='mmdiffkd.DDIMScheduler'))
        num_steps = len(self.scheduler.timesteps)
        self.num_grad_steps = num_steps if num_grad_steps is None else num_grad_steps
        if not 1 <= self.num_grad_steps <= num_steps:
            raise ValueError(
                f'num_grad_steps={num_grad_steps} must be between 1 and scheduler.num_inference_steps={num_steps}.'
            )
        self.autoencoder = None if latent_channels is None else LinearAutoencoder(teacher_channels, channels)
        self.noise_adapter = MODELS.build(
            noise_adapter or dict(type='mmdiffkd.NoiseAdapter'), default_args=dict(channels=channels)
        )
        self.denoiser = MODELS.build(
            denoiser or dict(type='mmdiffkd.BottleneckDenoiser'),
            default_args=dict(channels=channels, num_train_timesteps=self.scheduler.num_train_timesteps),
        )
        self.proj = ConvChain(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        for name in ('denoiser', 'noise_adapter', 'proj') if memory_efficient else ():
            chains = [module for module in getattr(self, name).modules() if isinstance(module, ConvChain)]
            if not chains and any(True for _ in getattr(self, name).parameters()):
                raise ValueError(
                    f'memory_efficient=True has no effect on the {name} {type(getattr(self, name)).__name__}: wrap '
                    'its layers in mmdiffkd.models.ConvChain, or set memory_efficient=False.'
                )
            for chain in chains:
                chain.memory_efficient = True

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
            raise ValueError(
                f'{name} compares class by class, but the student has {student} classes and the teacher {teacher}; tap '
                "features instead, such as dict(student='backbone', teacher='backbone')."
            )
        if student == 1:
            raise ValueError(
                f'{name} compares distributions over classes, but there is only one channel; use a loss for '
                "features, such as dict(type='mmdiffkd.MSELoss')."
            )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        noise_inputs: Optional[NoiseInputs] = None,
        mask: Optional[Tensor] = None,
        return_trajectory: bool = False,
    ) -> DiffusionOutput:
        """Compare student features with teacher features.

        Args:
            student (Tensor): Student features, (N, C_s, H, W), resized to the teacher features.
            teacher (Tensor): Teacher features, (N, C_t, H', W'). If the student features are pooled (1x1), the teacher
                features are pooled, too.
            noise_inputs (NoiseInputs, optional): Noise and timesteps to use instead of random ones. Defaults to None.
            mask (Tensor, optional): Valid pixels, (N, 1, h, w) of type bool, resized to the teacher features. Only used
                by losses that accept it, as ``loss_kd(student, teacher, mask)``. None uses all pixels. Defaults to
                None.
            return_trajectory (bool): Whether to return the trajectory. Defaults to False.

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
        if self.training and teacher[:, 0].numel() == 1:
            # batch statistics need more than one value per channel: use the running statistics
            in_training = [module for module in self.modules() if module.training]
            self.eval()
            try:
                return self.forward(student, teacher, noise_inputs, mask, return_trajectory)
            finally:
                for module in in_training:  # frozen modules stay in eval mode
                    module.training = True
        if self.denoise:  # the fastest layout for convolutions and BatchNorm
            student = student.contiguous(memory_format=torch.channels_last)
            teacher = teacher.contiguous(memory_format=torch.channels_last)
        noise_inputs = noise_inputs or NoiseInputs()
        latent = self._align(student, teacher.shape[-2:])
        target = teacher.detach()
        if not self.denoise:
            return DiffusionOutput(dict(loss_kd=self._distance(latent, target, mask)), None, latent, target, latent)

        losses = {}
        if self.autoencoder is not None:
            target, reconstruction = self.autoencoder(target)
            loss = F.mse_loss(reconstruction.float(), teacher.detach().float())
            losses['loss_reconstruction'] = self.loss_reconstruction_weight * loss
            target = target.detach()
        samples: List[Tensor] = []
        clean, gamma = self._denoise(latent, noise_inputs.adapter_noise, samples if return_trajectory else None)
        denoised = self.proj(clean)
        losses['loss_diffusion'] = self.loss_diffusion_weight * self._diffusion_loss(target, noise_inputs)
        losses['loss_kd'] = self._distance(denoised, target, mask)
        return DiffusionOutput(losses, gamma, denoised, target, latent, samples)

    def _align(self, student: Tensor, size: torch.Size) -> Tensor:
        latent = self.align(student)
        if latent.shape[-2:] == size:
            return latent
        if size == (1, 1):  # interpolation would use the center pixels only
            return latent.mean(dim=(2, 3), keepdim=True)
        return F.interpolate(latent, size, mode='bilinear', align_corners=False)

    def _distance(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor]) -> Tensor:
        student, teacher = student.float().contiguous(), teacher.float().contiguous()  # some losses call view()
        if mask is None or not getattr(self.loss_kd, 'takes_mask', False):
            return self.loss_kd(student, teacher)
        mask = F.interpolate(mask.float(), teacher.shape[-2:], mode='nearest-exact')[:, 0] > 0
        return self.loss_kd(student, teacher, mask)

    def _denoise(
        self, latent: Tensor, noise: Optional[Tensor], samples: Optional[List[Tensor]]
    ) -> Tuple[Tensor, Tensor]:
        """Blend noise into the student latent (equation 8) and denoise it; collect the steps in ``samples``."""
        gamma = self.noise_adapter(latent)
        if noise is None:
            noise = _randn_like(latent)
        sample = torch.lerp(noise, latent.float(), gamma.view(-1, 1, 1, 1))
        if samples is not None:
            samples.append(sample)
        for index, timestep in enumerate(self.scheduler.timesteps):
            # one timestep embedding for the whole batch
            timesteps = torch.full((1,), timestep, dtype=torch.long, device=latent.device)
            predicted = self.denoiser(sample, timesteps)
            if index < len(self.scheduler.timesteps) - self.num_grad_steps:
                predicted = predicted.detach()  # with no_grad, autocast would cache weights without gradient
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
        return (self.denoiser(noisy, timesteps).float() - prediction_target).square().mean()


def _randn_like(x: Tensor) -> Tensor:
    """Draw float32 noise in the memory order of a channels-last tensor, which is much faster than NCHW order."""
    n, c, h, w = x.shape
    return torch.randn(n, h, w, c, device=x.device).permute(0, 3, 1, 2)
