"""Conv-BN fusion, channels-last memory format and compilation for the frozen teacher.

:class:`.Teacher` calls these functions when it receives the first batch.
"""

import copy
from typing import Callable, Dict, Iterable, List, Optional

import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn

Features = Dict[str, List[Optional[Tensor]]]
# Largest mean difference that counts as a rounding error, relative to the mean absolute value of a level. Rounding
# errors are about 1e-6 in float32, and larger with TF32.
TOLERANCE = 1e-2


def optimize_for_inference(model: nn.Module, channels_last: bool) -> nn.Module:
    """Copy a model in eval mode and fuse BatchNorm into the convolutions of the copy. Other weights are shared.

    Args:
        model (nn.Module): The model. Only the memory format of its convolution weights is changed.
        channels_last (bool): Whether convolutions use the channels-last memory format.

    Returns:
        nn.Module: The copy. Check its features with :func:`find_mismatch`: they are wrong if a BatchNorm is registered
        after a convolution but does not follow the convolution in the forward pass.

    Raises:
        Exception: If copying or fusing fails, for example for custom layers.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = fuse_conv_bn(copy.deepcopy(model, shared)).requires_grad_(False).eval()
    set_memory_format(model, torch.channels_last if channels_last else torch.contiguous_format)
    return model


def set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Set the memory format of the convolution weights of a model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=memory_format)


def find_mismatch(expected: Features, found: Features) -> Optional[str]:
    """Find the first tap whose features differ by more than rounding errors; None if all taps agree.

    Args:
        expected (dict[str, list[Tensor or None]]): Features by tap and level.
        found (dict[str, list[Tensor or None]]): Features of the model to check.
    """
    for path, levels in expected.items():
        if [_shape(level) for level in levels] != [_shape(level) for level in found[path]]:
            return path
        for ours, theirs in zip(levels, found[path]):
            if ours is None or not ours.numel():  # nothing to compare, for example because there are no RoIs
                continue
            if not (ours - theirs).abs().mean() <= TOLERANCE * ours.abs().mean():
                return path
    return None


def compile_parts(model: nn.Module, taps: Iterable[str], compiler: Callable = torch.compile, prefix: str = '') -> None:
    """Compile, in place, the largest submodules without a tap inside.

    The hooks of taps therefore run outside the compiled code.

    Args:
        model (nn.Module): The model.
        taps (iterable[str]): Paths of the tapped modules.
        compiler (callable): Compiles a function. Defaults to ``torch.compile``.
        prefix (str): Path of ``model`` inside the teacher, with a trailing dot. Defaults to ''.
    """
    for name, child in model.named_children():
        path = f'{prefix}{name}'
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or any(tap.startswith(f'{path}.') for tap in taps):
            compile_parts(child, taps, compiler, f'{path}.')
        else:
            child.forward = compiler(child.forward)


def _shape(level: Optional[Tensor]) -> Optional[torch.Size]:
    return None if level is None else level.shape
