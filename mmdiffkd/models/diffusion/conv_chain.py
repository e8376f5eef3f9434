from typing import List, Optional

import torch
from torch import Tensor, nn

from .lean_run import Layer, LeanRun

try:
    from torch.compiler import is_compiling
except ImportError:  # torch before 2.3
    from torch._dynamo.external_utils import is_compiling


class Residual(nn.Module):
    """Add layers' output to their input.

    Args:
        *layers (nn.Module): They map (N, C, H, W) to (N, C, H, W).
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = ConvChain(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return x + self.layers(x)


class ConvChain(nn.Sequential):
    """A ``Sequential`` that keeps little for the backward pass.

    Autograd keeps the input of every convolution, BatchNorm and ReLU. This keeps the input of the chain, and the
    outputs of those convolutions that are costly to compute again; normalisation, activation, sums, and convolutions
    that read little for what they write are done again in the backward pass. Results and gradients are those of the
    plain ``Sequential``, which also runs where the chain has something else in it (SyncBatchNorm, hooks, FSDP around
    single layers), where no gradient is wanted, and under ``torch.compile``, which decides itself what to keep.
    There are no second derivatives.

    Attributes:
        memory_efficient (bool): Keep the input alone and compute all else again. Defaults to False.
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
        return LeanRun.apply(x, layers, self.memory_efficient, *(p for layer in layers for p in layer.parameters))


def _read(chain: nn.Sequential) -> Optional[List[Layer]]:
    """The layers of a chain; None if it holds what :class:`LeanRun` does not know."""
    layers: List[Layer] = []
    for module in chain:
        last = layers[-1] if layers else None
        if _is_watched(module):
            return None
        if type(module) is nn.Conv2d and module.padding_mode == 'zeros' and not isinstance(module.padding, str):
            layers.append(Layer(module))
        elif type(module) is nn.BatchNorm2d and last and not (last.closes or last.norm or last.relu):
            if not module.affine or not module.track_running_stats or module.momentum is None:
                return None
            layers[-1] = last._replace(norm=module)
        elif type(module) is nn.ReLU and last and last.norm and not last.closes:
            layers[-1] = last._replace(relu=True)
        elif isinstance(module, Residual):
            is_bare = type(module.layers) is ConvChain and not _is_watched(module.layers)
            inner = _read(module.layers) if is_bare else None
            if not inner or any(layer.opens for layer in inner):
                return None
            inner[0] = inner[0]._replace(opens=True)
            inner[-1] = inner[-1]._replace(closes=True)
            layers += inner
        else:
            return None
    return None if layers and layers[-1].relu else layers


def _is_watched(module: nn.Module) -> bool:
    """Whether anything is to happen when the module is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or 'forward' in module.__dict__
