from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, check_arguments

from .utils import masked_mean


@MODELS.register_module()
class CosineLoss(nn.Module):
    """One minus the cosine similarity of the channels at each position, averaged over positions.

    The length of a position's feature vector has no effect. The loss equals half the squared distance between the
    vectors of student and teacher after both are scaled to length 1. AM-RADIO (Ranzinger et al., CVPR 2024) and Theia
    (Shang et al., CoRL 2024) use this loss and a smooth L1 loss to distill feature maps of foundation models.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 1.
    """

    takes_mask = True

    @check_arguments
    def __init__(self, loss_weight: NonNegative = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compare features.

        Args:
            student (Tensor): (N, C, H, W).
            teacher (Tensor): Same shape.
            mask (Tensor, optional): Valid pixels, (N, H, W) of type bool. None uses all pixels.

        Returns:
            Tensor: A scalar; 0 if no pixel is valid.
        """
        distance = 1 - F.cosine_similarity(student, teacher, dim=1)
        return self.loss_weight * masked_mean(distance.flatten(), mask)
