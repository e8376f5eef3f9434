from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from .utils import flatten_logits, masked_mean


@MODELS.register_module()
class KLDivergence(nn.Module):
    """KL divergence of the softened classes, averaged over rows and multiplied by tau squared (Hinton et al.).

    Args:
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Factor of the loss. Defaults to 1.
    """

    compares_classes = True
    takes_mask = True

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compare logits.

        Args:
            student (Tensor): (N, K) or (N, K, H, W).
            teacher (Tensor): The same shape.
            mask (Tensor, optional): Pixels that count, (N, H, W) of type bool. None counts all.

        Returns:
            Tensor: A scalar; 0 where no pixel counts.
        """
        log_student = (flatten_logits(student) / self.tau).log_softmax(dim=1)
        log_teacher = (flatten_logits(teacher) / self.tau).log_softmax(dim=1)
        divergence = F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(dim=1)
        return self.loss_weight * self.tau**2 * masked_mean(divergence, mask)
