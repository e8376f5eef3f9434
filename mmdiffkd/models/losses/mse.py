import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS


@MODELS.register_module()
class MSELoss(nn.Module):
    """Mean squared error over all elements, the paper's distance for features (and FitNet's).

    Args:
        loss_weight (float): Factor of the loss. Defaults to 1.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare tensors of one shape; returns a scalar."""
        return self.loss_weight * F.mse_loss(student, teacher)
