from typing import Optional, Sequence

import torch
from torch import Tensor


def flatten_logits(logits: Tensor) -> Tensor:
    """Reshape logits to (rows, classes). A row is a sample, or a pixel of a logit map.

    Args:
        logits (Tensor): (N, K) or (N, K, H, W).

    Returns:
        Tensor: (N, K) or (N * H * W, K).
    """
    return logits if logits.dim() == 2 else logits.flatten(2).transpose(1, 2).flatten(0, 1)


def masked_mean(values: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """Compute the mean over the valid rows.

    Args:
        values (Tensor): One value per row, (rows, ).
        mask (Tensor, optional): Valid rows, (rows, ) or (N, H, W) of type bool. None uses all rows.

    Returns:
        Tensor: A scalar; 0 if no row is valid.
    """
    if mask is None:
        return values.mean()
    # multiply by the mask: indexing with the mask would synchronize the GPU
    mask = mask.flatten().to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def normalize_channels(feature: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardize each channel by its statistics, as BatchNorm without affine parameters does in training.

    Args:
        feature (Tensor): (N, C, H, W).
        eps (float): Added to the variance. Defaults to 1e-5.

    Returns:
        Tensor: Same shape. A channel with a single value becomes 0.
    """
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), unbiased=False, keepdim=True)
    return (feature - mean) * (variance + eps).rsqrt()


def spatial_attention(feature: Tensor, tau: float) -> Tensor:
    """Compute the attention of each position: a softmax over the mean absolute value of the channels.

    Args:
        feature (Tensor): (N, C, H, W).
        tau (float): Temperature.

    Returns:
        Tensor: (N, 1, H, W), with a mean of 1 over the positions.
    """
    saliency = feature.abs().mean(dim=1, keepdim=True)
    attention = (saliency.flatten(1) / tau).softmax(dim=1) * saliency[0].numel()
    return attention.view_as(saliency)


def class_labels(data_samples: Optional[Sequence]) -> Tensor:
    """Return the class of each image. Mixed images, as from MixUp, have the class with the highest score.

    Args:
        data_samples (list, optional): Data samples with ``gt_label`` or ``gt_score``.

    Returns:
        Tensor: Integers, (N, ).

    Raises:
        ValueError: If an image has no class or several classes.
    """
    labels = []
    for sample in data_samples or ():
        score, label = getattr(sample, 'gt_score', None), getattr(sample, 'gt_label', None)
        labels.append(label if score is None else score.argmax())
    if not labels or any(label is None or label.numel() != 1 for label in labels):
        raise ValueError(
            'this loss needs one class per image (gt_label in the data samples); use a loss without labels, such as '
            "dict(type='mmdiffkd.KLDivergence')."
        )
    return torch.cat([label.flatten() for label in labels])
