from torch import Tensor


def as_rows(logits: Tensor) -> Tensor:
    """View logits as (rows, classes): a row for every sample, or for every pixel of a map.

    Args:
        logits (Tensor): (N, K) or (N, K, H, W).

    Returns:
        Tensor: (N, K) or (N * H * W, K).
    """
    return logits if logits.dim() == 2 else logits.flatten(2).transpose(1, 2).flatten(0, 1)
