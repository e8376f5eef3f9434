"""Record the inputs and outputs of modules with forward hooks."""

import re
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from mmdiffkd.utils.check_config import closest_names

from ..feature_maps import TapError, Tokens, as_map, flatten
from .batches import find_images

# Parts of module paths that FSDP, activation checkpointing and torch.compile insert.
WRAPPERS = re.compile(r'(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.|$)')


def find_module(model: nn.Module, path: str, owner: str) -> nn.Module:
    """Find the module at a path, also if FSDP, activation checkpointing or torch.compile has wrapped it.

    Args:
        model (nn.Module): The model.
        path (str): Path of the module without wrappers, for example ``'neck'`` or ``'bbox_head.retina_reg'``.
        owner (str): ``'student'`` or ``'teacher'``, for the error message.

    Raises:
        TapError: If there is no module at this path. The message lists similar paths.
    """
    with suppress(AttributeError):  # fast path for models without wrappers, because every iteration calls this function
        if path:
            return model.get_submodule(path)
    modules: Dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # setdefault() keeps the wrapper, which is listed before its module: hooks must be registered on the wrapper
        modules.setdefault(WRAPPERS.sub('', name).lstrip('.'), module)
    modules.pop('', None)
    if path not in modules:
        raise TapError(
            f"The {owner} {type(model).__name__} has no module '{path}' to tap; "
            f'the nearest are {closest_names(path, modules)}.'
        )
    return modules[path]


class _LastTapReached(BaseException):
    """Raised in a hook to end a forward pass. It is not an ``Exception``, so ``except Exception`` does not catch it."""


class ModuleOutputsRecorder(AbstractContextManager):
    """Record the outputs of modules during a forward pass.

    Forward hooks are registered only inside the ``with`` block.

    Args:
        model (nn.Module): The model to run.
        paths (iterable[str]): Paths of the modules to tap.
        owner (str): ``'student'`` or ``'teacher'``, for error messages.
        stop_after (dict[str, int], optional): Number of calls by path. The forward pass ends when each module has been
            called this number of times. None runs the whole forward pass. Defaults to None.
        on_copy (callable, optional): Function that is called with each output tensor and its copy. Defaults to None.

    Attributes:
        outputs (dict[str, list[list[Tensor or None]]]): Copies of the output tensors by path, one list per call.
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
            # copy the tensors, because later in-place operators, such as a ReLU, may change them
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
        """Return the outputs of a tap, grouped by forward pass of the model.

        A student may run several forward passes in one ``loss()``. Passes without gradients, such as those of an EMA
        model, are left out if at least one pass has gradients.

        Args:
            path (str): Path of the tapped module.
            calls (int): Number of times that one forward pass calls the module.
            skip_frozen (bool): Whether to leave out each single call without gradients before grouping. Set if all
                calls of a pass with gradients have gradients.

        Returns:
            list[list[list[Tensor or None]]]: Outputs by pass, call and output. There is at least one pass. If the
            module was called fewer than ``calls`` times, the only pass is incomplete.
        """
        outputs = self.outputs[path]
        if skip_frozen:
            outputs = list(filter(_learns, outputs)) or outputs
        passes = [outputs[i : i + calls] for i in range(0, len(outputs) - calls + 1, calls)]
        return [calls for calls in passes if any(map(_learns, calls))] or passes or [outputs]

    def features(self, path: str, input_size, tokens: Optional[Sequence[Optional[Tokens]]] = None):
        """Return the levels of a tap as feature maps. Each output tensor of each call is a level.

        Outputs that are None, such as auxiliary outputs in prediction, stay None.

        Args:
            path (str): Path of the tapped module.
            input_size (tuple[int, int]): Height and width of the images, which determine the token grid.
            tokens (list[Tokens or None], optional): Token layout of each level in the dry run. If the module was called
                more often than in the dry run, the outputs of the additional calls are dropped.

        Returns:
            list[Tensor or None]: The levels, (N, C, H, W) each.

        Raises:
            TapError: If an output is not a feature map.
        """
        return self.as_maps(path, self.outputs[path], input_size, tokens)

    def as_maps(self, path: str, calls: Sequence[Sequence[Optional[Tensor]]], input_size, tokens=None):
        """Return the outputs of the given calls as feature maps; see :meth:`features`."""
        tensors = [tensor for call in calls for tensor in call]
        tokens = [None] * len(tensors) if tokens is None else tokens
        return [
            None if tensor is None else as_map(tensor, input_size, path, layout)
            for tensor, layout in zip(tensors, tokens)
        ]


def _learns(call: Sequence[Optional[Tensor]]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in call)


class ModuleInputsRecorder(AbstractContextManager):
    """Record the images that a model's encoder receives inside the ``with`` block.

    If gradients are enabled when the block starts, calls under ``torch.no_grad()`` are left out.

    Args:
        model (nn.Module): The model.
        path (str): Path of the encoder.

    Attributes:
        images (list[Tensor]): One batch of images, (N, C, H, W), per call of the encoder.
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
    """Record the RoIs of a detector's box branch inside the ``with`` block: one tensor (R, 5) per call."""
    rois: List[Tensor] = []
    extractor = model.roi_head.bbox_roi_extractor
    handle = extractor.register_forward_pre_hook(lambda module, args: rois.append(args[1]))
    try:
        yield rois
    finally:
        handle.remove()
