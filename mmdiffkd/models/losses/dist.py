from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from .utils import flatten_logits, masked_mean


@MODELS.register_module()
class DISTLoss(nn.Module):
    """DIST loss: match relations between classes and between samples by correlation (Huang et al., NeurIPS 2022).

    The probabilities y = softmax(z / tau) have one row per sample and one column per class. The inter-class term is 1
    minus the mean correlation between the rows of student and teacher. The intra-class term is 1 minus the mean
    correlation between the columns. In logit maps, each pixel is a sample.

    Args:
        beta (float): Weight of the inter-class term. Defaults to 1.
        gamma (float): Weight of the intra-class term. Defaults to 1.
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Weight of the loss. Defaults to 1.
    """

    compares_classes = True
    takes_mask = True

    @check_arguments
    def __init__(
        self, beta: NonNegative = 1.0, gamma: NonNegative = 1.0, tau: Positive = 1.0, loss_weight: NonNegative = 1.0
    ):
        super().__init__()
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Compare logits.

        Args:
            student (Tensor): (N, K) or (N, K, H, W).
            teacher (Tensor): Same shape.
            mask (Tensor, optional): Valid pixels, (N, H, W) of type bool. None uses all pixels.

        Returns:
            Tensor: A scalar; 0 if no pixel is valid.
        """
        student = (flatten_logits(student) / self.tau).softmax(dim=1)
        teacher = (flatten_logits(teacher) / self.tau).softmax(dim=1)
        inter = masked_mean(1 - _correlation(student, teacher), mask)
        if mask is None:
            intra = 1 - _correlation(student.t(), teacher.t()).mean()
        else:
            valid = mask.flatten().to(student.dtype)
            intra = (1 - _correlation(student.t(), teacher.t(), valid).mean()) * valid.max()
        return self.loss_weight * self.tau**2 * (self.beta * inter + self.gamma * intra)


def _correlation(a: Tensor, b: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """Compute the Pearson correlation between each row of ``a`` and the same row of ``b``.

    ``valid`` is 1 for the columns to use and 0 for the columns to ignore. None uses all columns.
    """
    return F.cosine_similarity(_centered(a, valid), _centered(b, valid), dim=1, eps=1e-8)


def _centered(a: Tensor, valid: Optional[Tensor]) -> Tensor:
    if valid is None:
        return a - a.mean(dim=1, keepdim=True)
    mean = (a * valid).sum(dim=1, keepdim=True) / valid.sum().clamp(min=1)
    return (a - mean) * valid
