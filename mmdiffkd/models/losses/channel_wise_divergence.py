from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from .utils import masked_mean, normalize_channels

LOWEST = -1e30


@MODELS.register_module()
class ChannelWiseDivergence(nn.Module):
    """CWD loss: KL divergence between spatial softmaxes, averaged over channels (Shu et al., ICCV 2021).

    Args:
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Weight of the loss. Defaults to 1.
        normalize (bool): Whether to standardize each channel of student and teacher over batch and positions first.
            The scale of a channel then has no effect. The distillation configs of RTMDet do the same with a BatchNorm
            that has neither affine parameters nor running statistics. Defaults to False.
    """

    compares_positions = True
    takes_mask = True

    @check_arguments
    def __init__(self, tau: Positive = 1.0, loss_weight: NonNegative = 1.0, normalize: bool = False):
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight
        self.normalize = normalize

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compare features or logits.

        Args:
            student (Tensor): (N, C, H, W).
            teacher (Tensor): Same shape.
            mask (Tensor, optional): Valid pixels, (N, H, W) of type bool. None uses all pixels.

        Returns:
            Tensor: A scalar; 0 if no pixel is valid.
        """
        if self.normalize:
            student, teacher = normalize_channels(student), normalize_channels(teacher)
        student, teacher = student / self.tau, teacher / self.tau
        if mask is not None:
            # LOWEST is finite, because -inf would give NaN for images without valid pixels
            ignored = ~mask.unsqueeze(1)
            student, teacher = student.masked_fill(ignored, LOWEST), teacher.masked_fill(ignored, LOWEST)
        log_student = student.flatten(2).log_softmax(dim=2)
        log_teacher = teacher.flatten(2).log_softmax(dim=2)
        divergence = F.kl_div(log_student, log_teacher, reduction='none', log_target=True)
        has_pixels = None
        if mask is not None:
            divergence = divergence * mask.flatten(1).unsqueeze(1)
            has_pixels = mask.flatten(1).any(dim=1)
        return self.loss_weight * self.tau**2 * masked_mean(divergence.sum(dim=2).mean(dim=1), has_pixels)
