from typing import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(forward: Callable, ignore: Iterable[Tensor] = ()) -> int:
    """What a forward pass keeps for the backward pass, every storage counted once; meta tensors will do.

    Args:
        forward (callable): The forward pass.
        ignore (iterable[Tensor]): Tensors that are there anyway, such as weights and inputs. Defaults to none.

    Returns:
        int: Bytes.
    """
    ignored = {tensor.untyped_storage()._cdata for tensor in ignore}  # meta tensors have no address
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            kept[storage._cdata] = storage  # alive, or another would take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
