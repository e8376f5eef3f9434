from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from .utils import spatial_attention


@MODELS.register_module()
class AttentionMSELoss(nn.Module):
    """Mean squared error weighted by the teacher's spatial attention: the paper's variant for detection.

    The weight of a position is ``V = H W softmax(mean_c |F_t| / tau)``. The mean of V over the map is 1. The paper
    defines V but does not say how the loss uses V. Here, V multiplies the squared error of each position.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
        tau (float): Temperature of the softmax. Defaults to 0.5.
    """

    @check_arguments
    def __init__(self, loss_weight: NonNegative = 1.0, tau: Positive = 0.5):
        super().__init__()
        self.loss_weight = loss_weight
        self.tau = tau

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features of shape (N, C, H, W) and return a scalar."""
        error = (student - teacher).square().mean(dim=1, keepdim=True)
        return self.loss_weight * (spatial_attention(teacher, self.tau) * error).mean()
