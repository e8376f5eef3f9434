from typing import Dict, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import NonNegative, Positive, check_arguments

from .utils import flatten_logits

REMOVED = -1e30  # logit of a removed class; finite, because -inf gives NaN in the gradient


@MODELS.register_module()
class DKDLoss(nn.Module):
    """DKD loss: KL divergence, decoupled into target class and non-target classes (Zhao et al., CVPR 2022).

    The target term (TCKD) compares binary distributions: the probability of the true class, and the sum of the
    probabilities of all other classes. The non-target term (NCKD) compares the distributions over the non-target
    classes. Both terms are multiplied by tau squared.

    mmrazor's ``DKDLoss`` ignores ``reduction='mean'`` and sums over the batch, so it is larger than the authors' loss
    by a factor of the batch size. In this class, ``reduction='sum'`` equals mmrazor's ``'mean'``, ``'sum'`` and
    ``'none'``, and ``reduction='mean'`` equals the authors' loss and mmrazor's ``'batchmean'``.

    The authors multiply the loss by ``min(epoch / warmup, 1)``, which changes once per epoch. For a warm-up that
    changes in every iteration, use ``DistillScheduleHook(warmup=...)``.

    Args:
        tau (float): Temperature. Defaults to 1.
        alpha (float): Weight of the target term. Defaults to 1.
        beta (float): Weight of the non-target term. Defaults to 1.
        reduction (str): ``'mean'`` or ``'sum'`` over the samples. Defaults to ``'mean'``.
        loss_weight (float): Weight of the loss. Defaults to 1.
    """

    compares_classes = True
    takes_labels = True

    @check_arguments
    def __init__(
        self,
        tau: Positive = 1.0,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 1.0,
        reduction: Literal['mean', 'sum'] = 'mean',
        loss_weight: NonNegative = 1.0,
    ):
        super().__init__()
        self.tau = tau
        self.alpha = alpha
        self.beta = beta
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Compare logits.

        Args:
            student (Tensor): (N, K) or (N, K, H, W).
            teacher (Tensor): Same shape.
            labels (Tensor): True classes, (N, ), or (N, H, W) for one class per pixel.

        Returns:
            Tensor: A scalar.
        """
        terms = self.terms(student, teacher, labels)
        return self.loss_weight * (self.alpha * terms['tckd'] + self.beta * terms['nckd'])

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Dict[str, Tensor]:
        """Return the terms ``tckd`` and ``nckd`` without their weights. Arguments: see :meth:`forward`."""
        labels = labels.flatten()
        rows = [flatten_logits(logits) / self.tau for logits in (student, teacher)]
        labels = labels.repeat_interleave(len(rows[0]) // len(labels))
        is_target = labels.unsqueeze(1) == torch.arange(rows[0].size(1), device=labels.device)
        tckd, nckd = ([part(row, is_target) for row in rows] for part in (_target_or_not, _others))
        return dict(tckd=self._divergence(*tckd), nckd=self._divergence(*nckd))

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the KL divergence of log-probabilities of shape (rows, classes)."""
        divergence = F.kl_div(student, teacher, reduction='none', log_target=True).sum(dim=1)
        return self.tau**2 * (divergence.mean() if self.reduction == 'mean' else divergence.sum())


def _target_or_not(logits: Tensor, is_target: Tensor) -> Tensor:
    """Return the log-probabilities of the target class and of all non-target classes together, (rows, 2)."""
    log_p = logits.log_softmax(dim=1)
    target = log_p.masked_fill(~is_target, 0.0).sum(dim=1)
    return torch.stack([target, log_p.masked_fill(is_target, REMOVED).logsumexp(dim=1)], dim=1)


def _others(logits: Tensor, is_target: Tensor) -> Tensor:
    """Return the log-probabilities over the non-target classes, (rows, classes)."""
    return logits.masked_fill(is_target, REMOVED).log_softmax(dim=1)
