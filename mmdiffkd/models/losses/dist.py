import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from .rows import as_rows


@MODELS.register_module()
class DISTLoss(nn.Module):
    """DIST: match relations between classes and between samples by correlation (Huang et al., NeurIPS 2022).

    With y = softmax(z / tau), the inter-class term is 1 - the mean correlation of the rows of y, the intra-class term
    the same for its columns. On maps every pixel is a row.

    Args:
        beta (float): Weight of the inter-class term. Defaults to 1.
        gamma (float): Weight of the intra-class term. Defaults to 1.
        tau (float): Temperature. Defaults to 1.
        loss_weight (float): Factor of the loss. Defaults to 1.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare logits of shape (N, K) or (N, K, H, W); returns a scalar."""
        student = (as_rows(student) / self.tau).softmax(dim=1)
        teacher = (as_rows(teacher) / self.tau).softmax(dim=1)
        inter = _mean_correlation_distance(student, teacher)
        intra = _mean_correlation_distance(student.t(), teacher.t())
        return self.loss_weight * self.tau**2 * (self.beta * inter + self.gamma * intra)


def _mean_correlation_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - the mean Pearson correlation of corresponding rows."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8).mean()
