from typing import Iterable

import torch
from torch import Tensor, nn


class _Untouched(torch.autograd.Function):
    """A zero that depends on parameters whose gradient is nothing: no arithmetic is done in either direction."""

    @staticmethod
    def forward(ctx, loss, *parameters):
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient, *[None] * ctx.count)


def touching(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The same loss, with parameters that it does not use in its graph.

    DDP waits for every registered parameter in every iteration; this reports those that are idle, without a value.

    Args:
        loss (Tensor): Scalar.
        parameters (iterable[Parameter]): Those that have had no part in it.

    Returns:
        Tensor: The loss.
    """
    return _Untouched.apply(loss, *parameters)
