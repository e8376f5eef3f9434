"""Masked generative distillation (MGD, ECCV 2022), to compare with."""

import torch
from torch import Tensor, nn

from mmdiffkd.models import FeatureDiffusion, FeatureDiffusionNeck
from mmdiffkd.registry import MODELS


class MaskedGeneration(FeatureDiffusion):
    """Pixels of the aligned student feature are left out at random, and two convolutions generate the whole from the
    rest; that is what is compared. Every level counts as its mean, where the authors' sum lets large ones count more.

    Args:
        student_channels (int): C_s.
        teacher_channels (int): C_t.
        mask_ratio (float): Share of the pixels that are left out. Defaults to 0.65, that of one-stage detectors.
        **kwargs: Of :class:`FeatureDiffusion`, but for those of denoising.
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
        kept = torch.rand_like(latent[:, :1]) >= self.mask_ratio
        return self.generation(latent * kept)


@MODELS.register_module()
class MGDNeck(FeatureDiffusionNeck):
    """A :class:`MaskedGeneration` of its own for every level."""

    part = MaskedGeneration
