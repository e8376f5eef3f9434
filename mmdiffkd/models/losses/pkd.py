import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, check_arguments


@MODELS.register_module()
class PKDLoss(nn.Module):
    """PKD loss: half the MSE of features standardized per channel (Cao et al., NeurIPS 2022).

    This equals 1 minus the Pearson correlation of each channel, averaged over the channels.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
    """

    # ratio of gradients that loss_weight='auto' aims at; above the default, because the best weights of PKD are large
    gradient_ratio = 30.0

    @check_arguments
    def __init__(self, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features of shape (N, C, H, W) and return a scalar."""
        return self.loss_weight * F.mse_loss(_standardize(student), _standardize(teacher)) / 2


def _standardize(feature: Tensor) -> Tensor:
    """Scale each channel to zero mean and unit variance over batch and positions."""
    channels = feature.transpose(0, 1).flatten(1)
    channels = channels - channels.mean(dim=1, keepdim=True)
    return channels / (channels.std(dim=1, unbiased=False, keepdim=True) + 1e-6)
