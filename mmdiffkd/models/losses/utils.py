from typing import Optional

from torch import Tensor


def flatten_logits(logits: Tensor) -> Tensor:
    """View logits as (rows, classes): a row for every sample, or for every pixel of a map.

    Args:
        logits (Tensor): (N, K) or (N, K, H, W).

    Returns:
        Tensor: (N, K) or (N * H * W, K).
    """
    return logits if logits.dim() == 2 else logits.flatten(2).transpose(1, 2).flatten(0, 1)


def masked_mean(values: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The mean over the rows that count.

    Args:
        values (Tensor): A value for every row, (rows, ).
        mask (Tensor, optional): Which rows count, (rows, ) or (N, H, W) of type bool. None counts all.

    Returns:
        Tensor: A scalar; 0 where no row counts.
    """
    if mask is None:
        return values.mean()
    # multiplied, not selected: the GPU need not tell how many there are
    mask = mask.flatten().to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)
