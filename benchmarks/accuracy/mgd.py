"""Masked generative distillation (MGD, ECCV 2022), a baseline of the benchmarks."""

import torch
from torch import Tensor, nn

from mmdiffkd.models import FeatureDiffusion, FeatureDiffusionNeck
from mmdiffkd.registry import MODELS


class MaskedGeneration(FeatureDiffusion):
    """Mask random pixels of the aligned student feature, and generate the full feature with two convolutions.

    The generated feature is compared with the teacher's. The loss of a level is the mean over its pixels; MGD's
    authors use the sum, which gives large levels more weight.

    Args:
        student_channels (int): Channels of the student's feature, C_s.
        teacher_channels (int): Channels of the teacher's feature, C_t.
        mask_ratio (float): Share of masked pixels. Defaults to 0.65, the authors' value for one-stage detectors.
        **kwargs: Arguments of :class:`FeatureDiffusion`, except those of denoising.
    """

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float = 0.65, **kwargs):
        super().__init__(student_channels, teacher_channels, denoise=False, **kwargs)
        self.mask_ratio = mask_ratio
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def _align(self, student: Tensor, size: torch.Size) -> Tensor:
        latent = super()._align(student, size)
        mask = torch.rand_like(latent[:, :1]) >= self.mask_ratio
        return self.generation(latent * mask)


@MODELS.register_module()
class MGDNeck(FeatureDiffusionNeck):
    """Neck with one :class:`MaskedGeneration` per level."""

    part = MaskedGeneration
