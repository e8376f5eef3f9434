"""Checkpoints as data: read without executing anything in them, and loaded only where they fit."""

import contextlib
import os
import os.path as osp
import re
from collections import OrderedDict
from pickle import UnpicklingError
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from torch import nn

URL_HASH = re.compile(r'-([a-f0-9]{8,})\.pth$')


def read_checkpoint(source: str) -> dict:
    """Read a checkpoint from a path or URL onto the CPU, with torch's ``weights_only`` reader.

    Beyond tensors it admits what mmengine stores beside them (history buffers, NumPy scalars and arrays). A download
    is checked against the hash in the file's name and is put in place only when complete.

    Args:
        source (str): Path or http(s) URL.

    Returns:
        dict: The checkpoint; its weights stand under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or holds more than data.
    """
    path = _download(source) if source.startswith(('http://', 'https://')) else source
    if not osp.isfile(path):
        raise FileNotFoundError(f"The checkpoint '{source}' does not exist (looked from {osp.abspath('.')}).")
    try:
        with _safe_globals():
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        if _looks_like_pickle(path):
            refused = re.search(r'GLOBAL ([\w.]+)', str(error))
            what = f'the object {refused.group(1)}' if refused else 'more than tensors and plain data'
            raise ValueError(
                f"The checkpoint '{source}' was refused because it holds {what}, which could run code when read; "
                "save its 'state_dict' alone with torch.save and use that file."
            ) from None
        raise ValueError(_not_a_checkpoint(source, path)) from None
    except (RuntimeError, EOFError, OSError):
        raise ValueError(_not_a_checkpoint(source, path)) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"The checkpoint '{source}' holds a {type(checkpoint).__name__} instead of a state_dict.")
    return checkpoint if 'state_dict' in checkpoint else dict(state_dict=checkpoint)


def load_strict(model: nn.Module, state_dict: dict, model_name: str, source: str) -> None:
    """Load weights that must fit the model key by key.

    The diffusion part of a distilled checkpoint (``diffkd.*``) is left out, so that a distilled student can teach.

    Args:
        model (nn.Module): Receives the weights.
        state_dict (dict): The weights.
        model_name (str): What the model is, for the error message.
        source (str): Where the weights are from, for the error message.

    Raises:
        ValueError: If keys are missing, unexpected or misshapen; it names them.
    """
    state = OrderedDict((re.sub(r'^module\.', '', key), value) for key, value in state_dict.items())
    state = OrderedDict((key, value) for key, value in state.items() if not key.startswith('diffkd.'))
    # upstream's key conversions look at the versions that stand in the metadata
    state._metadata = getattr(state_dict, '_metadata', None)
    own = model.state_dict()
    misshapen = [
        f'{key} ({_shape(state[key])} in the file, {_shape(own[key])} in the model)'
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if misshapen:
        raise ValueError(f'The weights of {source} do not fit {model_name}: {_some(misshapen)}.')
    result = model.load_state_dict(state, strict=False)
    missing = [key for key in result.missing_keys if not key.endswith('num_batches_tracked')]
    problems = [
        f'{kind} {_some(keys)}' for kind, keys in (('missing', missing), ('unexpected', result.unexpected_keys)) if keys
    ]
    if problems:
        raise ValueError(f'The weights of {source} do not fit {model_name}: {"; ".join(problems)}.')


def _safe_globals():
    """Admit what mmengine writes into a checkpoint beside tensors, and nothing more."""
    multiarray = (np.core if np.__version__.startswith('1.') else np._core).multiarray
    allowed = [HistoryBuffer, np.ndarray, np.dtype, _under_name(_history_buffer_method, 'builtins', 'getattr')]
    allowed += {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # NumPy 1 and 2 wrote different names
        allowed += [_under_name(getattr(multiarray, name), module, name) for name in ('_reconstruct', 'scalar')]
    if hasattr(torch.serialization, 'safe_globals'):
        return torch.serialization.safe_globals(allowed)
    if hasattr(torch.serialization, 'add_safe_globals'):  # torch 2.4
        torch.serialization.add_safe_globals(allowed)
    return contextlib.nullcontext()


def _history_buffer_method(owner: type, name: str):
    """Stands in for ``getattr``, which history buffers are pickled with: it gives their methods and nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def _under_name(function, module: str, name: str):
    """A function that the reader finds under the name that stands in the file."""

    def stand_in(*args):
        return function(*args)

    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name
    return stand_in


def _download(url: str) -> str:
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    path = osp.join(folder, osp.basename(urlparse(url).path))
    digest = URL_HASH.search(path)
    for my_turn in (is_main_process(), True):  # the first rank fetches it for all that share its cache
        if my_turn and not osp.isfile(path):
            os.makedirs(folder, exist_ok=True)
            # writes to a temporary name, compares the hash, then renames
            torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest.group(1), progress=False)
        barrier()
    return path


def _looks_like_pickle(path: str) -> bool:
    with open(path, 'rb') as file:
        start = file.read(2)
    return start[:1] == b'\x80' or start == b'PK'


def _not_a_checkpoint(source: str, path: str) -> str:
    with open(path, 'rb') as file:
        start = file.read(512).lstrip().lower()
    what = 'a web page saved under that name' if start.startswith((b'<!doctype', b'<html', b'<?xml')) else 'damaged'
    return f"'{source}' is no PyTorch checkpoint, it is {what} ({osp.getsize(path)} bytes); download it again."


def _shape(tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'scalar'


def _some(items: list, count: int = 4) -> str:
    rest = f' and {len(items) - count} more' if len(items) > count else ''
    return ', '.join(items[:count]) + rest
