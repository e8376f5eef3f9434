import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS


@MODELS.register_module()
class ChannelWiseDivergence(nn.Module):
    """CWD: KL divergence of every channel's spatial softmax, averaged over channels (Shu et al., ICCV 2021).

    Args:
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Factor of the loss. Defaults to 1.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features or logits of shape (N, C, H, W); returns a scalar."""
        log_student = (student.flatten(2).flatten(0, 1) / self.tau).log_softmax(dim=1)
        log_teacher = (teacher.flatten(2).flatten(0, 1) / self.tau).log_softmax(dim=1)
        loss = F.kl_div(log_student, log_teacher, reduction='batchmean', log_target=True)
        return self.loss_weight * self.tau**2 * loss
