"""Helpers for distributed runs: raise errors on all ranks, attach unused parameters, destroy the process group."""

from typing import Callable, Iterable

import torch
from mmengine.dist import all_gather_object
from torch import Tensor, nn


def on_all_ranks(function: Callable):
    """Call a function on every rank. If it fails on any rank, all ranks raise the first failing rank's error.

    Otherwise, ranks without an error would wait for the failed rank until a timeout. All ranks must call this function.
    Once ``function`` has reached code that can fail on a single rank, it must not communicate with other ranks.

    Args:
        function (callable): A function without arguments.

    Returns:
        Any: What the function returns on this rank.

    Raises:
        Exception: The first failing rank's error. Ranks with a different error or without an error raise a ValueError
            with the same text.
    """
    result = error = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    problems = all_gather_object(None if error is None else str(error))
    first = next((problem for problem in problems if problem is not None), None)
    if first is None:
        return result
    raise error if error is not None and str(error) == first else ValueError(first)


class _AttachUnused(torch.autograd.Function):
    """Identity function that adds parameters to the graph. Their gradients are None, which costs no computation."""

    @staticmethod
    def forward(ctx, loss, *parameters):
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient, *[None] * ctx.count)


def attach_unused_params(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Add unused parameters to the graph of a loss, with gradients of None.

    Needed for DDP, which waits for the gradient of every registered parameter in every iteration.

    Args:
        loss (Tensor): Scalar.
        parameters (iterable[Parameter]): Parameters that the loss does not depend on.

    Returns:
        Tensor: The same loss.
    """
    return _AttachUnused.apply(loss, *parameters)


def destroy_nccl_group() -> None:
    """Destroy the process group of a finished run, if its backend is NCCL, which warns about groups that remain.

    A gloo group is left alone, because it ends with the process. In torch 2.5, destroying it can hang: the call holds
    the GIL while it waits for a thread that needs the GIL.
    """
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_backend() == 'nccl'
    ):
        torch.distributed.destroy_process_group()
