import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from .rows import as_rows


@MODELS.register_module()
class KLDivergence(nn.Module):
    """KL divergence of the softened classes, averaged over rows and multiplied by tau squared (Hinton et al.).

    Args:
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Factor of the loss. Defaults to 1.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare logits of shape (N, K) or (N, K, H, W); returns a scalar."""
        log_student = (as_rows(student) / self.tau).log_softmax(dim=1)
        log_teacher = (as_rows(teacher) / self.tau).log_softmax(dim=1)
        loss = F.kl_div(log_student, log_teacher, reduction='batchmean', log_target=True)
        return self.loss_weight * self.tau**2 * loss
