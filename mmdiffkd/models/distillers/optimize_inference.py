"""Conv-BN fusion, channels-last memory format and compilation for the frozen teacher.

:class:`.Teacher` calls these functions when it receives the first batch.
"""

import copy
from typing import Callable, Dict, Iterable, List, Optional

import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn

Features = Dict[str, List[Optional[Tensor]]]
# Two features agree if their mean absolute difference is at most this fraction of their mean absolute value. Rounding
# errors are about 1e-6 in float32, and larger with TF32.
TOLERANCE = 1e-2


def optimize_for_inference(model: nn.Module, channels_last: bool) -> nn.Module:
    """Copy a model in eval mode, and fuse the BatchNorm layers of the copy into its convolutions.

    The copy shares all weights that fusion does not change with the model.

    Args:
        model (nn.Module): The model. Only the memory format of its convolution weights changes.
        channels_last (bool): Whether convolutions use the channels-last memory format.

    Returns:
        nn.Module: The copy. Its features must be checked with :func:`find_mismatch`. They are wrong if a BatchNorm is
        registered after a convolution but does not follow the convolution in the forward pass.

    Raises:
        Exception: If copying or fusing fails, for example for custom layers.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = fuse_conv_bn(copy.deepcopy(model, shared)).requires_grad_(False)
    model.eval()  # returns None for some models, such as LAD
    set_memory_format(model, torch.channels_last if channels_last else torch.contiguous_format)
    return model


def set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Set the memory format of the convolution weights of a model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=memory_format)


def find_mismatch(expected: Features, found: Features) -> Optional[str]:
    """Find the first tap whose features differ by more than rounding errors.

    Args:
        expected (dict[str, list[Tensor or None]]): Features of the original model, by tap and level.
        found (dict[str, list[Tensor or None]]): Features of the optimized model, by tap and level.

    Returns:
        str, optional: Path of the tap; None if the features of all taps agree.
    """
    for path, levels in expected.items():
        if [_shape(level) for level in levels] != [_shape(level) for level in found[path]]:
            return path
        for ours, theirs in zip(levels, found[path]):
            if ours is None or not ours.numel():  # there is nothing to compare, for example if there are no RoIs
                continue
            if not (ours - theirs).abs().mean() <= TOLERANCE * ours.abs().mean():
                return path
    return None


def compile_parts(model: nn.Module, taps: Iterable[str], compiler: Callable = torch.compile, prefix: str = '') -> None:
    """Compile the submodules of a model in place. A submodule that contains a tap is not compiled as a whole.

    Instead, the submodules of this submodule are compiled. The forward hooks of taps therefore run outside of compiled
    code.

    Args:
        model (nn.Module): The model.
        taps (iterable[str]): Paths of the tapped modules.
        compiler (callable): Function that compiles a function. Defaults to ``torch.compile``.
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
