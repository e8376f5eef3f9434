import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, check_arguments


@MODELS.register_module()
class ATLoss(nn.Module):
    """AT loss: mean squared error between normalized attention maps (Zagoruyko and Komodakis, ICLR 2017).

    The attention of a position is the mean of the squared features over the channels. The attention map of an image is
    divided by its L2 norm. Student and teacher may have different numbers of channels, so no adapter is needed.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
    """

    compares_channels = False
    compares_positions = True

    @check_arguments
    def __init__(self, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare features of shape (N, C_s, H, W) and (N, C_t, H, W), and return a scalar."""
        return self.loss_weight * (_attention(student) - _attention(teacher)).square().mean()


def _attention(feature: Tensor) -> Tensor:
    return F.normalize(feature.square().mean(dim=1).flatten(1), dim=1)
