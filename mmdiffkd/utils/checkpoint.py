"""Checkpoints as data: read without executing anything in them, and loaded only where they fit."""

import errno
import hashlib
import os
import os.path as osp
import re
from collections import OrderedDict
from contextlib import suppress
from pickle import UnpicklingError
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from torch import nn

from .safe_load import executable_format, load_data

STATE = 'state_dict'
PREFIX = 'diffkd.'  # of the diffusion part's keys
OTHER_SCHEME = re.compile(r'(?!https?:)[\w-]+://')
URL_HASH = re.compile(r'-([a-f0-9]{8,})\.pth$')


class DamagedFileError(ValueError):
    """A file that is no whole checkpoint."""


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
        ValueError: If it cannot be downloaded, is no checkpoint, or holds more than data.
    """
    content = _read_data(source)
    checkpoint = content if isinstance(content, dict) and STATE in content else {STATE: content}
    _check_state_dict(checkpoint[STATE], source)
    return checkpoint


def check_is_data(source: str) -> None:
    """Read a checkpoint that mmengine is about to load, since mmengine's loader may run code in it.

    Folders (sharded checkpoints) and other schemes, such as ``torchvision://`` and ``s3://``, are not looked into.

    Args:
        source (str): Path or URL.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_checkpoint`.
    """
    if not osp.isdir(source) and not OTHER_SCHEME.match(source):
        _read_data(source)


def without_diffusion_part(state_dict: dict) -> OrderedDict:
    """The weights of the student alone."""
    return OrderedDict((key, value) for key, value in state_dict.items() if not key.startswith(PREFIX))


def fingerprint(state_dict: dict) -> str:
    """A hash of weights that does not depend on the file they come in."""
    digest = hashlib.sha256()
    for key, value in sorted(state_dict.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    state = without_diffusion_part(state)
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
    # what the file has and a hook of upstream's leaves out is no weight, but computed when the model is built
    missing = [key for key in result.missing_keys if key not in state and not key.endswith('num_batches_tracked')]
    problems = [
        f'{kind} {_some(keys)}' for kind, keys in (('missing', missing), ('unexpected', result.unexpected_keys)) if keys
    ]
    if problems:
        raise ValueError(f'The weights of {source} do not fit {model_name}: {"; ".join(problems)}.')


def _read_data(source: str):
    """Whatever a file or address holds, if it is nothing but data."""
    is_url = source.startswith(('http://', 'https://'))
    path = _download(source) if is_url else osp.expanduser(source)
    if osp.isdir(path):
        raise ValueError(f"The checkpoint '{source}' is a folder, of a sharded run it seems; a single file is needed.")
    if not osp.isfile(path):
        raise FileNotFoundError(f"The checkpoint '{source}' does not exist (looked from {osp.abspath('.')}).")
    name = f'{source} (kept as {path})' if is_url else source
    if executable := executable_format(path):
        raise ValueError(
            f"The checkpoint '{name}' was refused because it is {executable}, which can run code when read; save its "
            "'state_dict' alone with torch.save and use that file."
        )
    try:
        return load_data(path)
    except Exception as error:  # the reader meets damage in many ways, one of them a seek before the file's start
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        if isinstance(error, UnpicklingError) and refused:
            raise ValueError(
                f"The checkpoint '{name}' was refused because it holds the object {refused.group(1)}, which could run "
                "code when read; save its 'state_dict' alone with torch.save and use that file."
            ) from None
        problem = _not_a_checkpoint(name, path)
        if is_url and not URL_HASH.search(path):
            # a connection that broke off can have left half a file, which must not be taken next time
            with suppress(FileNotFoundError):
                os.remove(path)
            problem += ' It has been removed; the next run downloads it anew.'
        raise DamagedFileError(problem) from None


def _download(url: str) -> str:
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    name = osp.basename(urlparse(url).path)
    if name in ('', '.', '..'):
        raise ValueError(f'The address {url} names no file.')
    path = osp.join(folder, name)
    digest = URL_HASH.search(path)
    problem = None
    for my_turn in (is_main_process(), True):  # the first rank fetches it for all that share its cache
        if my_turn and not osp.isfile(path):
            os.makedirs(folder, exist_ok=True)
            try:
                # writes to a temporary name, compares the hash, then renames
                torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest.group(1), progress=False)
            except (OSError, RuntimeError) as error:
                problem = error
        barrier()  # also where it failed: the others wait
    if not osp.isfile(path):
        raise ValueError(f'The checkpoint {url} could not be downloaded: {problem}.') from problem
    return path


def _check_state_dict(state_dict, name: str) -> None:
    if not isinstance(state_dict, dict):
        raise ValueError(f"The checkpoint '{name}' holds a {type(state_dict).__name__} instead of a state_dict.")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"The checkpoint '{name}' holds no state_dict: '{key}' is a {type(value).__name__}, not a tensor."
            )


def _not_a_checkpoint(source: str, path: str) -> str:
    with open(path, 'rb') as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b'<!doctype', b'<html', b'<?xml')):
        what = 'is a web page saved under that name; download it again'
    else:
        what = f'is damaged, perhaps cut short when it was saved or copied ({osp.getsize(path)} bytes)'
    return f"'{source}' is no PyTorch checkpoint, it {what}."


def _shape(tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'scalar'


def _some(items: list, count: int = 4) -> str:
    rest = f' and {len(items) - count} more' if len(items) > count else ''
    return ', '.join(items[:count]) + rest
