"""Record the inputs and outputs of modules with forward hooks, and convert outputs to feature maps.

This module also holds :func:`find_module`, which finds a tapped module, and :class:`TapError`, the error for taps that
cannot be distilled.
"""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, is_dataclass
from itertools import islice, product
from math import ceil, floor
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmdiffkd.utils.config import closest_names

from .batches import find_images

# names that FSDP, activation checkpointing and torch.compile insert into the paths of modules
WRAPPERS = re.compile(r'(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.|$)')

# a class token and four register tokens
MAX_EXTRA_TOKENS = 5


class Tokens(NamedTuple):
    """Token layout of a tap.

    Attributes:
        stride (float): Image pixels per token.
        extra (int): Number of tokens before the grid, such as class tokens.
    """

    stride: float
    extra: int


class TapError(ValueError):
    """A tap does not exist, is not called, or returns something that cannot be distilled."""


def find_module(model: nn.Module, path: str, owner: str) -> nn.Module:
    """Find the module at a path of ``named_modules()``.

    Args:
        model (nn.Module): The model.
        path (str): For example ``'neck'`` or ``'bbox_head.retina_reg'``. Wrappers of FSDP, activation checkpointing and
            torch.compile are not part of the path.
        owner (str): ``'student'`` or ``'teacher'``, for the error message.

    Raises:
        TapError: If there is no such module; the message lists similar paths.
    """
    with suppress(AttributeError):  # fast path: called in every iteration
        if path:
            return model.get_submodule(path)
    modules: Dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # a wrapper is listed before its module, and hooks must be registered on the wrapper
        modules.setdefault(WRAPPERS.sub('', name).lstrip('.'), module)
    modules.pop('', None)
    if path not in modules:
        raise TapError(
            f"The {owner} {type(model).__name__} has no module '{path}' to tap; "
            f'the nearest are {closest_names(path, modules)}.'
        )
    return modules[path]


class _LastTapReached(BaseException):
    """Raised in a hook to end a forward pass. Not an ``Exception``, so that models do not catch it."""


class ModuleOutputsRecorder(AbstractContextManager):
    """Record the outputs of modules during a forward pass.

    Forward hooks are registered only inside the ``with`` block.

    Args:
        model (nn.Module): The model to run.
        paths (iterable[str]): Modules to tap.
        owner (str): ``'student'`` or ``'teacher'``, for error messages.
        stop_after (dict[str, int], optional): Number of calls of each path after which the forward pass ends. None runs
            the whole forward pass. Defaults to None.
        on_copy (callable, optional): Called with each output tensor and its copy. Defaults to None.

    Attributes:
        outputs (dict[str, list[list[Tensor or None]]]): Output tensors by path, one list per call.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        owner: str,
        stop_after: Optional[Dict[str, int]] = None,
        on_copy: Optional[Callable[[Tensor, Tensor], None]] = None,
    ):
        self.outputs: Dict[str, List[List[Optional[Tensor]]]] = {path: [] for path in paths}
        self._modules = {path: find_module(model, path, owner) for path in self.outputs}
        self._stop_after = stop_after
        self._on_copy = on_copy
        self._handles = []

    def __enter__(self):
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, kind, error, traceback):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return kind is _LastTapReached

    def _hook(self, path: str):
        def record(module, inputs, output):
            # copy the tensors, because later modules, such as an in-place ReLU, may change them
            tensors = flatten(output, path)
            copies = [tensor if tensor is None else tensor.clone() for tensor in tensors]
            self.outputs[path].append(copies)
            for tensor, copy in zip(tensors, copies) if self._on_copy is not None else ():
                if copy is not None:
                    self._on_copy(tensor, copy)
            if self._stop_after and all(len(self.outputs[p]) >= n for p, n in self._stop_after.items()):
                raise _LastTapReached

        return record

    def passes(self, path: str, calls: int, skip_frozen: bool) -> List[List[List[Optional[Tensor]]]]:
        """Return the outputs of a tap by forward pass: of the passes that learn if there are any, or else of all.

        Args:
            path (str): A tapped path.
            calls (int): Number of calls of the module in a forward pass.
            skip_frozen (bool): Whether to leave out single calls without gradients, because a pass has none.

        Returns:
            list[list[list[Tensor or None]]]: At least one pass, which may be incomplete.
        """
        outputs = self.outputs[path]
        if skip_frozen:
            outputs = list(filter(_learns, outputs)) or outputs
        passes = [outputs[i : i + calls] for i in range(0, len(outputs) - calls + 1, calls)]
        return [calls for calls in passes if any(map(_learns, calls))] or passes or [outputs]

    def features(self, path: str, input_size, tokens: Optional[Sequence[Optional[Tokens]]] = None):
        """Return the levels of a tap as feature maps: one per call and per returned tensor.

        Outputs that are None, such as auxiliary outputs in prediction, stay None.

        Args:
            path (str): A tapped path.
            input_size (tuple[int, int]): Height and width of the images, which determine the token grid.
            tokens (list[Tokens or None], optional): Token layout of each level in the dry run. Outputs of additional
                calls, which the dry run did not make, are dropped.

        Returns:
            list[Tensor or None]: The levels.

        Raises:
            TapError: If an output is not a feature map.
        """
        return self.as_maps(path, self.outputs[path], input_size, tokens)

    def as_maps(self, path: str, calls: Sequence[Sequence[Optional[Tensor]]], input_size, tokens=None):
        """Return the outputs of some calls as feature maps; see :meth:`features`."""
        tensors = [tensor for call in calls for tensor in call]
        tokens = [None] * len(tensors) if tokens is None else tokens
        return [
            None if tensor is None else as_map(tensor, input_size, path, layout)
            for tensor, layout in zip(tensors, tokens)
        ]


def _learns(call: Sequence[Optional[Tensor]]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in call)


class ModuleInputsRecorder(AbstractContextManager):
    """Record the images that a model's encoder receives in a ``with`` block, one batch per call.

    If gradients are enabled in the block, calls under ``torch.no_grad()`` are left out.

    Attributes:
        images (list[Tensor]): The images, (N, C, H, W) per call.
    """

    def __init__(self, model: nn.Module, path: str):
        self.images: List[Tensor] = []
        self._module = find_module(model, path, 'student')

    def __enter__(self):
        self._expects_grad = torch.is_grad_enabled()
        self._handle = self._module.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def _record(self, module, args, kwargs):
        if torch.is_grad_enabled() or not self._expects_grad:
            self.images.extend(islice(find_images((args, kwargs)), 1))

    def __exit__(self, *error):
        self._handle.remove()


def is_roi_tap(path: str) -> bool:
    """Return whether a tap is in the box branch of a RoI head."""
    return path.split('.')[:2] == ['roi_head', 'bbox_head']


@contextmanager
def record_rois(model: nn.Module) -> Iterator[List[Tensor]]:
    """Record the RoIs, (R, 5), of each call of a detector's box branch."""
    rois: List[Tensor] = []
    extractor = model.roi_head.bbox_roi_extractor
    handle = extractor.register_forward_pre_hook(lambda module, args: rois.append(args[1]))
    try:
        yield rois
    finally:
        handle.remove()


def as_map(tensor: Tensor, input_size, path: str, tokens: Optional[Tokens] = None) -> Tensor:
    """Convert the output of a tap to a feature map.

    Args:
        tensor (Tensor): A feature map (N, C, H, W), tokens (N, L, C) that may start with class tokens, or vectors
            (N, C).
        input_size (tuple[int, int]): Height and width of the images.
        path (str): The tap, for the error message.
        tokens (Tokens, optional): Token layout, if known.

    Returns:
        Tensor: (N, C, H, W); vectors become maps of 1x1.

    Raises:
        TapError: If the tensor has a different shape.
    """
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[..., None, None]
    if tensor.dim() != 3:
        raise TapError(
            f"The tap '{path}' returns a tensor of shape {tuple(tensor.shape)}; tap a module that returns feature maps "
            '(N, C, H, W), tokens (N, L, C) or vectors (N, C).'
        )
    grid = _grid(tensor.size(1), input_size, tokens)
    if grid is None:
        images = f'images of {input_size[0]}x{input_size[1]}'
        if tokens is None:
            raise TapError(
                f"The tap '{path}' returns {tensor.size(1)} tokens, which do not form a grid on {images}; tap a module "
                'that returns feature maps.'
            )
        raise TapError(
            f"The tap '{path}' returns {tensor.size(1)} tokens on {images}, which do not form the grid of stride "
            f'{tokens.stride:g} that the tap returns in evaluation mode. If the model drops tokens in training, as in '
            'masked pre-training, distill in its fine-tuning instead.'
        )
    return tensor[:, tensor.size(1) - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def _grid(length: int, input_size, tokens: Optional[Tokens]) -> Optional[Tuple[int, int]]:
    """Return height and width of the token grid; None if there is no grid. The last tokens form the grid."""
    if tokens is not None:  # patches at the border may be dropped (floor) or padded (ceil)
        sides = [(floor(size / tokens.stride), ceil(size / tokens.stride)) for size in input_size]
        return next((grid for grid in product(*sides) if grid[0] * grid[1] == length - tokens.extra), None)
    ratio = input_size[1] / input_size[0]
    for extra in range(MAX_EXTRA_TOKENS + 1):
        count = length - extra
        if count < 4 * extra:  # too few tokens for a grid and class tokens
            return None
        height = round((count / ratio) ** 0.5)
        if not height or count % height or input_size[0] % height:  # not a grid, for example queries
            continue
        if abs(count / height - height * ratio) < 1:
            return height, count // height
    return None


def flatten(output, path: str) -> List[Optional[Tensor]]:
    """Return the feature tensors in nested tuples, lists, dicts and dataclasses, in order.

    Inside of these, None keeps its place. Other members are left out: for example sizes, scalars and masks.

    Args:
        output (Any): Output of a module.
        path (str): The tap, for the error message.

    Raises:
        TapError: If there is no tensor in the output.
    """
    found = [output] if isinstance(output, Tensor) else list(_members(output))
    if all(tensor is None for tensor in found):
        raise TapError(f"The tap '{path}' returns a {type(output).__name__}; tap a module that returns tensors.")
    return found


def _members(output) -> Iterator[Optional[Tensor]]:
    if isinstance(output, Mapping):
        members = output.values()
    elif isinstance(output, (tuple, list)):
        members = output
    elif is_dataclass(output):
        members = [getattr(output, field.name) for field in fields(output)]
    else:
        return
    for member in members:
        if not isinstance(member, Tensor) and member is not None:
            yield from _members(member)
        elif member is None or (member.dim() > 1 and member.is_floating_point()):
            yield member
