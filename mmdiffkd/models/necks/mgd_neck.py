from typing import Any, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Fraction, check_arguments

from ..diffusion.feature_diffusion import FeatureDiffusion
from .feature_diffusion_neck import FeatureDiffusionNeck


class MaskedGeneration(FeatureDiffusion):
    """MGD for one level: mask the student features, and generate the teacher features from the masked features.

    Args:
        student_channels (int): Student channels, C_s.
        teacher_channels (int): Teacher channels, C_t.
        mask_ratio (float): Share of positions or channels that are masked out.
        mask_channels (bool): Whether to mask channels instead of positions.
        align (bool, optional): Whether a 1x1 convolution maps the student features to C_t channels before they are
            masked. None adds the convolution only if C_s and C_t differ.
        loss_kd (dict, optional): Config of the distance; see :class:`FeatureDiffusion`.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        mask_ratio: float,
        mask_channels: bool,
        align: Optional[bool],
        loss_kd: Optional[dict],
    ):
        align = student_channels != teacher_channels if align is None else align
        super().__init__(student_channels, teacher_channels, denoise=False, align=align, loss_kd=loss_kd)
        self.mask_ratio = mask_ratio
        self.mask_channels = mask_channels
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def _align(self, student: Tensor, size: torch.Size) -> Tensor:
        latent = super()._align(student, size)
        return self.generation(latent * self.mask(latent))

    def mask(self, latent: Tensor) -> Tensor:
        """Return a random mask of aligned features: 0 where they are masked out, otherwise 1."""
        uniform = torch.rand_like(latent[:, :, :1, :1] if self.mask_channels else latent[:, :1])
        # channels and positions are compared in different directions, as in the released code
        is_masked = uniform < self.mask_ratio if self.mask_channels else uniform > 1 - self.mask_ratio
        return (~is_masked).to(latent.dtype)


@MODELS.register_module()
class MGDNeck(FeatureDiffusionNeck):
    """Masked generative distillation (Yang et al., ECCV 2022), with one module per level.

    Random positions of the student features are set to 0, and two 3x3 convolutions generate the teacher features from
    the masked features. Unlike dropout, the neck does not scale up the remaining features, and it also masks features
    in evaluation mode.

    The loss of the released code is the sum of the squared errors, divided by the number of images:
    ``loss_kd=dict(type='mmdiffkd.MSELoss', reduction='batchmean', loss_weight=2e-5)``. It grows with the channels and
    the size of the map, so large levels count more. The preset ``mgd`` sets this loss and the mask ratios of the
    released code.

    Args:
        student_channels (int or list[int]): Student channels, one number per level.
        teacher_channels (int or list[int]): Teacher channels, one number per level.
        mask_ratio (float): Share of positions that are masked out. Defaults to 0.65, as for one-stage detectors.
        mask_channels (bool): Whether to mask channels instead of positions, as for classifiers. Defaults to False.
        align (bool, optional): Whether a 1x1 convolution maps the student features to the teacher's channels before
            they are masked. None adds the convolution only on levels where the channels differ. Defaults to None.
        loss_kd (dict, optional): Config of the distance. The default type is ``MSELoss``.
        share_levels (bool): Whether all levels share one module. Defaults to False.

    Raises:
        ValueError: If an argument is invalid; see :class:`FeatureDiffusionNeck`.
    """

    gradient_ratio = 0.3  # ratio of gradients that loss_weight='auto' aims at
    part = MaskedGeneration
    denoises = False

    @check_arguments
    def __init__(
        self,
        student_channels: Union[int, Sequence[Any]],
        teacher_channels: Union[int, Sequence[Any]],
        mask_ratio: Fraction = 0.65,
        mask_channels: bool = False,
        align: Optional[bool] = None,
        loss_kd: Optional[dict] = None,
        share_levels: bool = False,
    ):
        super().__init__(
            student_channels,
            teacher_channels,
            share_levels,
            mask_ratio=mask_ratio,
            mask_channels=mask_channels,
            align=align,
            loss_kd=loss_kd,
        )
