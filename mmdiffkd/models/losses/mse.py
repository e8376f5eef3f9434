from typing import Literal

from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, check_arguments


@MODELS.register_module()
class MSELoss(nn.Module):
    """Mean squared error over all elements: the feature loss of the paper and of FitNets.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
        reduction (str): ``'mean'`` over all elements, or ``'batchmean'``, the sum divided by the number of images, as
            in MGD. Defaults to ``'mean'``.
    """

    @check_arguments
    def __init__(self, loss_weight: NonNegative = 1.0, reduction: Literal['mean', 'batchmean'] = 'mean'):
        super().__init__()
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare tensors of the same shape and return a scalar."""
        # not F.mse_loss, which saves both tensors for the backward pass; this line saves only the difference
        error = (student - teacher).square()
        return self.loss_weight * (error.mean() if self.reduction == 'mean' else error.sum() / len(error))
