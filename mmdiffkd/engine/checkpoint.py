"""Checkpoints: find the one to load, read it without executing code, and write files atomically."""

import codecs
import errno
import hashlib
import os
import os.path as osp
import pickle
import re
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from glob import escape, glob
from logging import WARNING
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import List, Optional, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import all_gather_object, barrier, broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import find_latest_checkpoint
from torch import nn

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


BUFFER_METHODS = ('min', 'max', 'mean', 'current')
ANNEALING = ('_annealing_cos', '_annealing_linear')


def executable_format(path: str) -> Optional[str]:
    """Name the format of a file if torch below 2.6 would run code in it in spite of ``weights_only``."""
    if tarfile.is_tarfile(path):
        return "in torch's format of before 2018 (tar)"  # CVE-2025-32434
    if zipfile.is_zipfile(path):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if any(osp.basename(name) == 'constants.pkl' for name in archive.namelist()):
                return 'a TorchScript archive'
    return None


def load_data(path: str):
    """Read a file with torch's ``weights_only`` reader, or before torch 2.4 with one that admits the same."""
    admitted = _admitted_globals()
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(admitted):
            return torch.load(path, map_location='cpu', weights_only=True)
    if hasattr(torch.serialization, 'add_safe_globals'):  # torch 2.4
        torch.serialization.add_safe_globals(admitted)
        return torch.load(path, map_location='cpu', weights_only=True)
    return torch.load(path, map_location='cpu', weights_only=False, pickle_module=restricted_pickle(admitted))


def _admitted_globals() -> list:
    """What mmengine writes into a checkpoint beside tensors, and nothing more."""
    multiarray = (np.core if np.__version__.startswith('1.') else np._core).multiarray
    admitted = [
        HistoryBuffer,
        OneCycleParamScheduler,
        np.ndarray,
        np.dtype,
        _under_name(_known_method, 'builtins', 'getattr'),
    ]
    admitted.append(_under_name(codecs.encode, '_codecs', 'encode'))  # how bytes are pickled
    admitted += {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # NumPy 1 and 2 wrote different names
        admitted += [_under_name(getattr(multiarray, name), module, name) for name in ('_reconstruct', 'scalar')]
    return admitted


def restricted_pickle(admitted: list) -> SimpleNamespace:
    """A ``pickle_module`` that finds what torch's own reader allows and what is admitted beside it.

    Args:
        admitted (list): Functions and classes.
    """
    from torch._weights_only_unpickler import _get_allowed_globals

    known = {**_get_allowed_globals(), **{f'{item.__module__}.{item.__name__}': item for item in admitted}}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            path = f'{module.replace("__builtin__", "builtins")}.{name}'
            if path not in known:
                raise UnpicklingError(f'GLOBAL {path}')
            return known[path]

    def load(file, **options):
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__='restricted_pickle')


def _known_method(owner: type, name: str):
    """Stands in for ``getattr``, which history buffers and one scheduler are pickled with: it gives their methods."""
    if name not in {HistoryBuffer: BUFFER_METHODS, OneCycleParamScheduler: ANNEALING}.get(owner, ()):
        raise UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def _under_name(function, module: str, name: str):
    """A function that the reader finds under the name that stands in the file."""

    def stand_in(*args):
        return function(*args)

    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name
    return stand_in


OF_A_RUN = ('meta', 'message_hub')  # what a checkpoint that can be resumed has beside the weights


def file_to_load(
    load_from: Optional[str], resume: Union[bool, str, None], work_dir: str, folder: str, filename_tmpl: str
) -> Optional[str]:
    """The file that a run loads or resumes; called on all ranks, it is the same on all.

    Args:
        load_from (str, optional): As in the config.
        resume (bool or str): As in the config; True without ``load_from`` is the newest checkpoint that can be read.
        work_dir (str): Folder of the run.
        folder (str): Folder of its checkpoints.
        filename_tmpl (str): Their names, such as ``'epoch_{}.pth'``.

    Returns:
        str or None: Path or URL; None if the run begins anew.

    Raises:
        ValueError: If the file is not there, is damaged, or holds more than data, on any rank; on all ranks.
    """
    named = resume if isinstance(resume, str) else load_from
    problem = None
    try:
        if named is not None:  # every rank reads it, from its own machine
            check_is_data(named)
        elif resume and is_main_process():
            named = newest_checkpoint(work_dir, folder, filename_tmpl)
    except (OSError, ValueError) as error:
        problem = str(error)
    for other in all_gather_object(problem):
        if other is not None:
            raise ValueError(other)
    answer = [named]
    broadcast_object_list(answer)
    return answer[0]


def newest_checkpoint(work_dir: str, folder: str, filename_tmpl: str) -> Optional[str]:
    """The newest checkpoint of a run that can be read; a message says what was passed over.

    Args:
        work_dir (str): Folder of the run.
        folder (str): Folder of its checkpoints.
        filename_tmpl (str): Their names.

    Returns:
        str or None: Its path; None if there are no checkpoints.

    Raises:
        ValueError: If none can be read, or the newest holds more than data.
    """
    files = saved_checkpoints(work_dir, folder, filename_tmpl)
    for file in files:
        try:
            if not osp.isdir(file):  # sharded checkpoints are folders
                missing = [key for key in OF_A_RUN if key not in read_checkpoint(file)]
                if missing:
                    raise DamagedFileError(f"'{file}' was not saved by a run, it has no {missing[0]}.")
            return file
        except (OSError, DamagedFileError) as error:
            print_log(f'{error} The checkpoint before it is tried.', logger='current', level=WARNING)
    if files:
        raise ValueError(
            f"None of the {len(files)} checkpoints of '{work_dir}' can be read: start anew without --resume, in "
            'another work_dir.'
        )
    print_log(f"There is no checkpoint in '{work_dir}' to resume; the run begins.", logger='current')
    return None


def saved_checkpoints(work_dir: str, folder: str, filename_tmpl: str) -> List[str]:
    """Newest first: what ``last_checkpoint`` names, then by time, since an older run may have left others."""
    before, after = re.split(r'\{.*?\}', filename_tmpl, maxsplit=1)
    pattern = re.compile(re.escape(before) + r'\d+' + re.escape(after))
    files = [file for file in glob(osp.join(escape(folder), '*')) if pattern.fullmatch(osp.basename(file))]
    files.sort(key=osp.getmtime, reverse=True)
    last = find_latest_checkpoint(work_dir)
    if last:
        files = [last] + [file for file in files if osp.abspath(file) != osp.abspath(last)]
    return files


NAME = 'mmdiffkd.atomic'


@register_backend(NAME)
class AtomicBackend(LocalBackend):
    """Local files that exist complete or not at all: written under a temporary name, then renamed."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a file.

        Args:
            obj (bytes): What to write.
            filepath (str or Path): Where; a file that is there is replaced.

        Raises:
            OSError: If the disk does not take it. The file that was there before is untouched then.
        """
        path = str(filepath)
        folder = osp.dirname(path) or '.'
        temporary = f'{path}.tmp'
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(folder)
        except OSError as error:
            with suppress(OSError):
                os.remove(temporary)
            raise OSError(
                f"'{path}' could not be written: {error.strerror or error} ({len(obj) / 1e6:.1f} MB needed, "
                f'{shutil.disk_usage(folder).free / 1e6:.1f} MB free). Files saved before are whole: make room and '
                'start again with --resume.'
            ) from error


def _sync_folder(folder: str) -> None:
    """Make the rename itself survive a power failure, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
