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
        # of F.mse_loss, autograd would keep both; of this, their difference
        return self.loss_weight * (student - teacher).square().mean()
