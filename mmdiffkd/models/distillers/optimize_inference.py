"""A teacher that gives the same features in less time."""

import copy
from typing import Callable, Dict, Iterable, List, Optional

import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn

Features = Dict[str, List[Optional[Tensor]]]
# of the mean size of a level; what was seen is 1e-6 in float32, TF32 rounds a thousand times coarser
TOLERANCE = 1e-2


def optimize_for_inference(model: nn.Module, channels_last: bool) -> nn.Module:
    """A copy that shares the weights of a model in eval mode, with BatchNorm folded into the convolutions.

    Args:
        model (nn.Module): The model; of it nothing changes but the memory format of its convolutions' weights.
        channels_last (bool): Whether convolutions work on that memory format.

    Returns:
        nn.Module: The copy. Its features are the model's, but where a BatchNorm that is no neighbour of a convolution
        was taken for one: compare them (:func:`find_mismatch`).

    Raises:
        Exception: Whatever copying or folding meets in layers that are not what they seem.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = fuse_conv_bn(copy.deepcopy(model, shared)).requires_grad_(False).eval()
    set_memory_format(model, torch.channels_last if channels_last else torch.contiguous_format)
    return model


def set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Set what the convolutions of a model work on."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=memory_format)


def find_mismatch(expected: Features, found: Features) -> Optional[str]:
    """The first tap whose features differ by more than rounding does, None if there is none.

    Args:
        expected (dict[str, list[Tensor or None]]): The levels of every tap.
        found (dict[str, list[Tensor or None]]): The same of another model.
    """
    for path, levels in expected.items():
        if [_shape(level) for level in levels] != [_shape(level) for level in found[path]]:
            return path
        for ours, theirs in zip(levels, found[path]):
            if ours is None or not ours.numel():  # no RoIs, say
                continue
            if not (ours - theirs).abs().mean() <= TOLERANCE * ours.abs().mean():
                return path
    return None


def compile_parts(model: nn.Module, taps: Iterable[str], compiler: Callable = torch.compile, prefix: str = '') -> None:
    """Compile the largest parts of a model that have no tap inside; taps are hooks, which run between the parts.

    Args:
        model (nn.Module): The model; its parts are changed in place.
        taps (iterable[str]): Paths of the tapped modules.
        compiler (callable): What makes a function quicker. Defaults to ``torch.compile``.
        prefix (str): Path of the model within the one that the taps count from. Defaults to ''.
    """
    for name, child in model.named_children():
        path = f'{prefix}{name}'
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or any(tap.startswith(f'{path}.') for tap in taps):
            compile_parts(child, taps, compiler, f'{path}.')
        else:
            child.forward = compiler(child.forward)


def _shape(level: Optional[Tensor]) -> Optional[torch.Size]:
    return None if level is None else level.shape
