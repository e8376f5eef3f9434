"""Record the inputs and outputs of modules with forward hooks."""

import re
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from mmdiffkd.utils.config import closest_names

from ..feature_maps import TapError, Tokens, as_map, flatten
from .batches import find_images

# names that FSDP, activation checkpointing and torch.compile insert into the paths of modules
WRAPPERS = re.compile(r'(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.|$)')


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
