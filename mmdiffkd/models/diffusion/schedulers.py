"""Noise schedulers, which add noise to features and remove it step by step.

A custom scheduler is a registered module with these members:

- ``num_train_timesteps`` (int): number of timesteps that the denoiser is trained on.
- ``timesteps`` (list[int]): timesteps of the denoising steps, from the first step to the last.
- ``sample_timesteps(num_samples, device)``: random timesteps for the diffusion loss, (N, ).
- ``add_noise(clean, noise, timesteps)``: the noisy features x_t, (N, C, H, W).
- ``target(clean, noise, timesteps)``: the training target of the denoiser, (N, C, H, W).
- ``step(model_output, timestep, sample)``: the sample after the denoising step at ``timestep``, (N, C, H, W).

Notation, as in DDPM and DDIM:

- ``betas``: variance added by each of the T training timesteps, linear from 1e-4 to 0.02
- ``alphas_cumprod``: a_t, the product of (1 - beta) up to t
- ``sample``: x_t (Z_t in the paper), features with the noise of timestep t; s is the timestep of the next step
- ``noise``: eps, standard normal
- x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                                (forward diffusion)
- x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) eps, with x_0 from the line above  (DDIM step, eta = 0)
"""

from typing import Annotated, List, Literal, Optional, Union

import torch
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, Fraction, Limits, Natural, check_arguments


@MODELS.register_module()
class DDIMScheduler(nn.Module):
    """Deterministic DDIM scheduler with a linear beta schedule (paper, section 3; the released code).

    All computations are in float32, also under autocast.

    Args:
        num_train_timesteps (int): Number of timesteps that the denoiser is trained on, T. Defaults to 1000.
        num_inference_steps (int): Number of denoising steps for student features. Defaults to 5.
        start_timestep (int, optional): Timestep of the first denoising step. The timesteps of the next steps are evenly
            spaced down to 0. ``None`` follows the released code: it divides T into ``2 * num_inference_steps`` equal
            intervals and uses the lower half, for example 400, 300, 200, 100, 0 for five steps. Defaults to None.
        beta_start (float): Beta of the first timestep. Defaults to 1e-4.
        beta_end (float): Beta of the last timestep. Defaults to 0.02.
        prediction_type (str): Prediction of the denoiser: ``'epsilon'`` (the noise), ``'sample'`` (x_0) or
            ``'v_prediction'`` (sqrt(a_t) eps - sqrt(1 - a_t) x_0). Defaults to ``'epsilon'``, as in the paper.

    Raises:
        ValueError: If ``num_inference_steps`` or ``start_timestep`` is out of range, or a value is invalid.
    """

    @check_arguments
    def __init__(
        self,
        num_train_timesteps: Annotated[int, Limits(2, 100_000)] = 1000,
        num_inference_steps: int = 5,
        start_timestep: Optional[Natural] = None,
        beta_start: Fraction = 1e-4,
        beta_end: Fraction = 0.02,
        prediction_type: Literal['epsilon', 'sample', 'v_prediction'] = 'epsilon',
    ):
        super().__init__()
        if not 1 <= num_inference_steps <= num_train_timesteps // 2:
            raise ConfigError(
                'num_inference_steps',
                f'={num_inference_steps} must be between 1 and half of num_train_timesteps={num_train_timesteps}.',
            )
        if start_timestep is not None and not num_inference_steps - 1 <= start_timestep < num_train_timesteps:
            raise ConfigError(
                'start_timestep',
                f'={start_timestep} must be between num_inference_steps - 1 = {num_inference_steps - 1} and '
                f'num_train_timesteps - 1 = {num_train_timesteps - 1}.',
            )
        if not 0 < beta_start <= beta_end < 1:
            raise ConfigError(
                'beta_end', f'={beta_end} must be at least beta_start={beta_start}, both between 0 and 1.'
            )
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type
        self.timesteps = self._inference_timesteps(num_inference_steps, start_timestep)
        alphas_cumprod = self._make_alphas_cumprod(beta_start, beta_end)
        # step() reads single values as Python floats, which avoids synchronizing the GPU
        self._alphas_cumprod = alphas_cumprod.tolist()
        self.register_buffer('alphas_cumprod', alphas_cumprod, persistent=False)

    def _inference_timesteps(self, num_steps: int, start: Optional[int]) -> List[int]:
        if start is None:
            stride = self.num_train_timesteps // (2 * num_steps)
            return [i * stride for i in reversed(range(num_steps))]
        if num_steps == 1:
            return [start]
        return [start * i // (num_steps - 1) for i in reversed(range(num_steps))]

    def _make_alphas_cumprod(self, beta_start: float, beta_end: float) -> Tensor:
        """Compute a_t of all timesteps, (T, ). Override this method for a different noise schedule."""
        betas = torch.linspace(beta_start, beta_end, self.num_train_timesteps, dtype=torch.float32, device='cpu')
        return torch.cumprod(1 - betas, dim=0)

    def sample_timesteps(self, num_samples: int, device: Union[str, torch.device]) -> Tensor:
        """Draw one timestep per sample from a uniform distribution.

        Args:
            num_samples (int): Number of samples, N.
            device (str or torch.device): Device of the timesteps.

        Returns:
            Tensor: Integers, (N, ).
        """
        return torch.randint(self.num_train_timesteps, (num_samples,), device=device)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to clean features (forward diffusion).

        Args:
            clean (Tensor): x_0, (N, C, H, W).
            noise (Tensor): eps, same shape.
            timesteps (Tensor): One integer timestep per sample, (N, ).

        Returns:
            Tensor: x_t in float32, (N, C, H, W).
        """
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt() * clean.float() + (1 - alphas).sqrt() * noise.float()

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the training target of the denoiser.

        Args:
            clean (Tensor): x_0, (N, C, H, W).
            noise (Tensor): eps, same shape.
            timesteps (Tensor): One integer timestep per sample, (N, ).

        Returns:
            Tensor: Target, (N, C, H, W).
        """
        if self.prediction_type == 'epsilon':
            return noise
        if self.prediction_type == 'sample':
            return clean
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt() * noise.float() - (1 - alphas).sqrt() * clean.float()

    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        """Apply one denoising step; the last step returns the predicted x_0.

        Args:
            model_output (Tensor): Prediction of the denoiser, (N, C, H, W).
            timestep (int): Timestep of ``sample``, one of ``timesteps``.
            sample (Tensor): x_t, same shape.

        Returns:
            Tensor: Sample at the next timestep in float32, (N, C, H, W).
        """
        alpha = self._alphas_cumprod[timestep]
        index = self.timesteps.index(timestep)
        is_last = index + 1 == len(self.timesteps)
        alpha_next = 1.0 if is_last else self._alphas_cumprod[self.timesteps[index + 1]]
        sample, model_output = sample.float(), model_output.float()
        if self.prediction_type == 'epsilon':
            # the DDIM step in one sum: x_next = sqrt(a_next / a) x + (sqrt(1 - a_next) - sqrt(a_next (1 - a) / a)) eps
            scale_sample = (alpha_next / alpha) ** 0.5
            scale_noise = (1 - alpha_next) ** 0.5 - (alpha_next * (1 - alpha) / alpha) ** 0.5
            return (scale_sample * sample).add_(model_output, alpha=scale_noise)
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        if self.prediction_type == 'sample':
            clean, eps = model_output, (sample - signal * model_output) / noise
        else:
            clean, eps = signal * sample - noise * model_output, signal * model_output + noise * sample
        return alpha_next**0.5 * clean + (1 - alpha_next) ** 0.5 * eps
