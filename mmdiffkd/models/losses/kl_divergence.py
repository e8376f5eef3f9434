from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from .utils import flatten_logits, masked_mean


@MODELS.register_module()
class KLDivergence(nn.Module):
    """KL divergence between softened class distributions, averaged over samples or pixels.

    The divergence is multiplied by tau squared (Hinton et al., 2015).

    Args:
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Weight of the loss. Defaults to 1.
    """

    compares_classes = True
    takes_mask = True

    @check_arguments
    def __init__(self, tau: Positive = 1.0, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compare logits.

        Args:
            student (Tensor): (N, K) or (N, K, H, W).
            teacher (Tensor): Same shape.
            mask (Tensor, optional): Valid pixels, (N, H, W) of type bool. None uses all pixels.

        Returns:
            Tensor: A scalar; 0 if no pixel is valid.
        """
        log_student = (flatten_logits(student) / self.tau).log_softmax(dim=1)
        log_teacher = (flatten_logits(teacher) / self.tau).log_softmax(dim=1)
        divergence = F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(dim=1)
        return self.loss_weight * self.tau**2 * masked_mean(divergence, mask)
