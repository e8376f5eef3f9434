"""Build and run models to inspect them, on the meta device or with random weights that are fast to create."""

import copy
from contextlib import suppress
from typing import Callable, Iterable, Optional

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
ELEMENTWISE = (
    aten.add.Tensor,
    aten.addcmul.default,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.sub.Tensor,
    aten.threshold_backward.default,
)
RANDOM_FILLS = (aten.normal_.default, aten.uniform_.default)
# Number of random values in the block that QuickInit repeats. It is a prime number, so that no two filters of a layer
# get the same values.
BLOCK = 65521


def build_for_inspection(model_cfg: dict) -> nn.Module:
    """Build a model on the meta device to inspect its structure, without changing the random state.

    Args:
        model_cfg (dict): Config of the model.

    Returns:
        nn.Module: The model, without weights; see :func:`build_on_meta`.
    """
    with torch.random.fork_rng(devices=[]):
        return build_on_meta(model_cfg)


def build_on_cpu(model_cfg: dict) -> nn.Module:
    """Build a model on the CPU with the weights of :class:`QuickInit`, without changing the random state.

    Args:
        model_cfg (dict): Config of the model.

    Returns:
        nn.Module: The model.
    """
    with torch.random.fork_rng(devices=[]), QuickInit():
        return MODELS.build(copy.deepcopy(model_cfg))


def build_on_meta(model_cfg: dict) -> nn.Module:
    """Build a model on the meta device, where it takes no memory.

    Some constructors fail on the meta device, because they read values of tensors or load weights, as language models
    of transformers do. Such a model is built on the CPU and then moved to the meta device.

    Args:
        model_cfg (dict): Config of the model.

    Returns:
        nn.Module: The model, without weights.

    Raises:
        Exception: The error of the model's constructor.
    """
    with suppress(Exception), torch.device('meta'):
        return MODELS.build(copy.deepcopy(model_cfg))
    with suppress(Exception), torch.device('meta'), _LinspaceOnCPU():
        return MODELS.build(copy.deepcopy(model_cfg)).to('meta')
    with torch.device('cpu'):
        return build_on_cpu(model_cfg).to('meta')


class _LinspaceOnCPU(TorchFunctionMode):
    """Run ``torch.linspace`` on the CPU, because many backbones read stochastic depth rates from its result."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.linspace:
            kwargs = dict(kwargs, device=kwargs.get('device') or 'cpu')
        return function(*args, **kwargs)


class QuickInit(TorchDispatchMode):
    """Fill large CPU tensors by repeating one block of random numbers, which is five times as fast as usual.

    Use this mode to build models whose weights are loaded afterwards, or models that only run in a check.

    >>> with QuickInit():
    ...     model = MODELS.build(cfg)
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if function in RANDOM_FILLS else None
        if tensor is None or tensor.numel() <= BLOCK or not tensor.is_cpu or not tensor.is_contiguous():
            return function(*args, **kwargs)
        block = function(tensor.new_empty(BLOCK), *args[1:], **kwargs)
        flat, rest = tensor.view(-1), tensor.numel() % BLOCK
        flat[: flat.numel() - rest].view(-1, BLOCK).copy_(block)
        flat[flat.numel() - rest :].copy_(block[:rest])
        return tensor


class QuickMeta(TorchDispatchMode):
    """Speed up batch normalization and elementwise arithmetic on meta tensors.

    These operators return empty tensors of the right shape directly, without torch's slow decompositions. All other
    operators run as usual.

    >>> with torch.device('meta'), QuickMeta():
    ...     model(images)
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = None
        if not kwargs and isinstance(args[0] if args else None, Tensor) and args[0].is_meta:
            if function is aten.native_batch_norm.default:
                output = _batch_norm(*args)
            elif function is aten.native_batch_norm_backward.default:
                output = _batch_norm_backward(*args)
            elif function in ELEMENTWISE:
                output = _elementwise(args)
        return function(*args, **kwargs) if output is None else output


def _batch_norm(x: Tensor, *others) -> tuple:
    return torch.empty_like(x), _statistic(x), _statistic(x)


def _batch_norm_backward(gradient: Tensor, x: Tensor, *others) -> tuple:
    needs_x, *needs_affine = others[-1]  # output_mask: which gradients autograd needs
    return torch.empty_like(x) if needs_x else None, *(_statistic(x) if needed else None for needed in needs_affine)


def _statistic(x: Tensor) -> Tensor:
    """Return an empty tensor with one value per channel, in float32 or a wider dtype."""
    return x.new_empty(x.size(1), dtype=torch.promote_types(x.dtype, torch.float32))


def _elementwise(args: tuple) -> Optional[Tensor]:
    """Return the empty output of an elementwise operator.

    Returns:
        Tensor, optional: None if the operator must run as usual. It may be skipped only if all arguments are numbers or
        floating-point tensors of equal shape, dtype and strides.
    """
    first, *others = args
    for other in others:
        if not isinstance(other, Tensor):
            fits = isinstance(other, (int, float))
        else:
            fits = other.is_meta and other.dtype == first.dtype and other.shape == first.shape
            fits = fits and other.stride() == first.stride()
        if not fits:
            return None
    return torch.empty_like(first) if first.is_floating_point() else None


class MultiplyAddCounter(FlopCounterMode):
    """Count the multiply-adds of convolutions and matrix products. OpenMMLab's ``get_flops.py`` calls them FLOPs.

    >>> with MultiplyAddCounter() as counter:
    ...     model(images)
    >>> counter.total
    """

    def __init__(self):
        super().__init__(display=False)

    @property
    def total(self) -> int:
        """Number of multiply-adds so far, in forward and backward passes."""
        return self.get_total_flops() // 2


def saved_activation_bytes(forward: Callable, ignore: Iterable[Tensor] = ()) -> int:
    """Return the size of the tensors that a forward pass saves for the backward pass. Works with meta tensors, too.

    Args:
        forward (callable): Function that runs the forward pass.
        ignore (iterable[Tensor]): Tensors that are not counted, such as weights and inputs. Defaults to ``()``.

    Returns:
        int: Size in bytes. Tensors that share a storage are counted once.
    """
    # identify storages by _cdata, because meta tensors have no data_ptr()
    ignored = {tensor.untyped_storage()._cdata for tensor in ignore}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in ignored:
            saved[storage._cdata] = storage  # keep the storage alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
