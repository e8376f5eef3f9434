"""Errors and the end of distributed runs."""

from typing import Callable

import torch.distributed as torch_dist
from mmengine.dist import all_gather_object


def on_all_ranks(function: Callable):
    """Call a function on every rank. If it fails on any rank, all ranks raise the first failing rank's error.

    Otherwise, ranks without an error would wait for the others until a timeout. All ranks must call this function. The
    function may communicate with the other ranks only before it can fail on a single rank.

    Args:
        function (callable): A function without arguments.

    Returns:
        Any: What the function returns on this rank.

    Raises:
        Exception: The function's error; on a rank with a different error or without any, a ValueError with its text.
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


def destroy_nccl_group() -> None:
    """Destroy the process group of a finished run, if its backend is NCCL, which warns about groups that remain.

    The group of gloo ends with the process: torch 2.5 can hang when it destroys this group, because it holds the GIL
    while it waits for a thread that needs the GIL.
    """
    if torch_dist.is_available() and torch_dist.is_initialized() and torch_dist.get_backend() == 'nccl':
        torch_dist.destroy_process_group()
