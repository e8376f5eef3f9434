from typing import Optional

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
