"""Convolution chains that recompute activations in the backward pass instead of saving them."""

from contextlib import contextmanager, nullcontext
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

try:
    from torch.compiler import is_compiling
except ImportError:  # torch before 2.3
    from torch._dynamo.external_utils import is_compiling


class Layer(NamedTuple):
    """A convolution, its BatchNorm and ReLU, and whether it starts or ends a residual block."""

    conv: nn.Conv2d
    norm: Optional[nn.BatchNorm2d] = None
    relu: bool = False
    block_start: bool = False
    block_end: bool = False

    @property
    def parameters(self) -> Tuple[Optional[Tensor], ...]:
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return (self.conv.weight, self.conv.bias, *norm)

    @property
    def is_kept(self) -> bool:
        """Whether to save the output, because recomputing it costs ``out_channels`` or more products per element."""
        return self.norm is not None and self.conv.weight[0].numel() >= self.conv.out_channels


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Disable the autocast cache: before torch 2.6, plain layers would reuse weights cast here without gradient."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


class RecomputeFunction(Function):
    """Forward and backward pass of a chain of layers that saves few activations.

    Per layer, it saves the output if ``Layer.is_kept``, and the statistics of the normalization: the mean, and 1 / std
    in training mode or the variance in eval mode.
    """

    @staticmethod
    @_without_autocast_cache()
    def forward(ctx, x: Tensor, layers: List[Layer], memory_efficient: bool, *parameters: Optional[Tensor]) -> Tensor:
        kept: List[Optional[Tensor]] = []
        value = skip = x
        for layer, (weight, bias, scale, shift) in zip(layers, _in_fours(parameters)):
            if layer.block_start:
                skip = value
            output = value = _convolve(layer.conv, value, weight, bias)
            mean = invstd_or_var = None
            if layer.norm is not None:
                norm = layer.norm
                value, mean, invstd_or_var = torch.native_batch_norm(
                    output, scale, shift, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
                )
                if not norm.training:
                    mean, invstd_or_var = norm.running_mean, norm.running_var
            if layer.relu:
                value.relu_()
            if layer.block_end:
                value = value.add_(skip) if value.dtype == skip.dtype else value + skip
            kept += [output if layer.is_kept and not memory_efficient else None, mean, invstd_or_var]
        ctx.layers = layers
        ctx.trained = [layer.norm is not None and layer.norm.training for layer in layers]
        ctx.dtype = output.dtype  # dtype of the convolutions; differs from that of x under autocast
        ctx.save_for_backward(x, *parameters, *kept)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        layers, (x, *saved) = ctx.layers, ctx.saved_tensors
        count = len(layers)
        parameters, kept = _in_fours(saved[: 4 * count]), saved[4 * count :]
        wanted, *wanted_of = ctx.needs_input_grad[0], *_in_fours(ctx.needs_input_grad[3:])
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):  # no autocast on meta
            inputs, outputs = _compute_again(ctx, x, parameters, kept)
            gradients: List[Optional[Tensor]] = []
            activation = skip = None
            for index in reversed(range(count)):
                layer, (weight, bias, scale, _), wants = layers[index], parameters[index], wanted_of[index]
                mean, invstd_or_var = kept[3 * index + 1 : 3 * index + 3]
                value, output = inputs.pop(), outputs.pop()
                if layer.block_end:
                    skip = gradient
                gradient = gradient.to(ctx.dtype)
                if layer.relu:
                    gradient = torch.ops.aten.threshold_backward(gradient, activation, 0)
                of_norm = [None, None]
                if layer.norm is not None:
                    statistics = (
                        (None, None, mean, invstd_or_var) if ctx.trained[index] else (mean, invstd_or_var, None, None)
                    )
                    gradient, *of_norm = torch.ops.aten.native_batch_norm_backward(
                        gradient, output, scale, *statistics, ctx.trained[index], layer.norm.eps, [True, *wants[2:]]
                    )
                conv = layer.conv
                gradient, *of_conv = torch.ops.aten.convolution_backward(
                    gradient,
                    value,
                    weight.to(ctx.dtype),
                    None if bias is None else bias.shape,
                    conv.stride,
                    conv.padding,
                    conv.dilation,
                    False,
                    [0, 0],
                    conv.groups,
                    [index > 0 or wanted, *wants[:2]],
                )
                if layer.block_start and gradient is not None:
                    gradient = gradient.add_(skip) if gradient.dtype == skip.dtype else gradient + skip
                activation = value
                gradients[:0] = [*of_conv, *of_norm]
        gradients = [g if g is None else g.to(p.dtype) for g, p in zip(gradients, saved)]
        return None if gradient is None else gradient.to(x.dtype), None, None, *gradients


def _compute_again(ctx, x: Tensor, parameters, kept) -> Tuple[List[Tensor], List[Optional[Tensor]]]:
    """Recompute the inputs and outputs of all convolutions; outputs that no gradient depends on are None."""
    inputs, outputs = [], []
    value = skip = x
    for index, (layer, (weight, bias, scale, shift)) in enumerate(zip(ctx.layers, parameters)):
        output, mean, invstd_or_var = kept[3 * index : 3 * index + 3]
        is_last = index + 1 == len(ctx.layers)
        if layer.block_start:
            skip = value
        value = value.to(ctx.dtype)
        inputs.append(value)
        if output is None and not (is_last and layer.norm is None):
            bias = bias if bias is None else bias.to(ctx.dtype)
            output = _convolve(layer.conv, value, weight.to(ctx.dtype), bias)
        outputs.append(output)
        if is_last:
            break
        value = output
        if layer.norm is not None:
            factor = scale * (invstd_or_var if ctx.trained[index] else (invstd_or_var + layer.norm.eps).rsqrt())
            offset = shift - mean * factor
            value = torch.addcmul(offset.view(-1, 1, 1), output, factor.view(-1, 1, 1)).to(ctx.dtype)
        if layer.relu:
            value.relu_()
        if layer.block_end:
            value = value.add_(skip) if value.dtype == skip.dtype else value + skip
    return inputs, outputs


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _in_fours(values: Sequence) -> List[Sequence]:
    return [values[start : start + 4] for start in range(0, len(values), 4)]


class Residual(nn.Module):
    """Residual block that adds the output of its layers to their input.

    Args:
        *layers (nn.Module): Layers that map (N, C, H, W) to (N, C, H, W).
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = ConvChain(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return x + self.layers(x)


class ConvChain(nn.Sequential):
    """A ``Sequential`` that saves few activations for the backward pass.

    Autograd saves the input of every convolution, BatchNorm and ReLU. ``ConvChain`` saves its input and the outputs of
    convolutions that are expensive to recompute. The backward pass recomputes normalization, activations, residual sums
    and cheap convolutions. Results and gradients equal those of a plain ``Sequential``. Second derivatives are not
    supported.

    The chain runs as a plain ``Sequential`` if it contains unsupported modules (SyncBatchNorm, modules with hooks,
    layers wrapped by FSDP), if no gradient is needed, and under ``torch.compile``, which chooses the activations to
    save itself.

    Attributes:
        memory_efficient (bool): Save only the input of the chain and recompute everything else. Defaults to False.
    """

    memory_efficient = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H, W)."""
        is_lean = torch.is_grad_enabled() and not is_compiling() and x[:, 0].numel() > 1
        layers = _read(self) if is_lean else None
        if not layers:
            return super().forward(x)
        for layer in layers:
            if layer.norm is not None and layer.norm.training:
                layer.norm.num_batches_tracked.add_(1)
        return RecomputeFunction.apply(
            x, layers, self.memory_efficient, *(p for layer in layers for p in layer.parameters)
        )


def _read(chain: nn.Sequential) -> Optional[List[Layer]]:
    """Return the layers of a chain; None if it contains modules that :class:`RecomputeFunction` does not support."""
    layers: List[Layer] = []
    for module in chain:
        last = layers[-1] if layers else None
        if _is_watched(module):
            return None
        if type(module) is nn.Conv2d and module.padding_mode == 'zeros' and not isinstance(module.padding, str):
            layers.append(Layer(module))
        elif type(module) is nn.BatchNorm2d and last and not (last.block_end or last.norm or last.relu):
            if not module.affine or not module.track_running_stats or module.momentum is None:
                return None
            layers[-1] = last._replace(norm=module)
        elif type(module) is nn.ReLU and last and last.norm and not last.block_end:
            layers[-1] = last._replace(relu=True)
        elif isinstance(module, Residual):
            is_bare = type(module.layers) is ConvChain and not _is_watched(module.layers)
            inner = _read(module.layers) if is_bare else None
            if not inner or any(layer.block_start for layer in inner):
                return None
            inner[0] = inner[0]._replace(block_start=True)
            inner[-1] = inner[-1]._replace(block_end=True)
            layers += inner
        else:
            return None
    return None if layers and layers[-1].relu else layers


def _is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks or a patched ``forward``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or 'forward' in module.__dict__
