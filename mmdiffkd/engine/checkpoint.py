"""Find the checkpoint to load, read it without executing code, and write checkpoints atomically."""

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
from functools import cache
from glob import escape, glob
from locale import getpreferredencoding
from logging import WARNING
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import List, Optional, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import BaseStorageBackend, LocalBackend, get_file_backend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OneCycleParamScheduler
from torch import nn

from .dist import on_all_ranks
from .object_store import copy_from_store, is_in_store, list_store, remove_copy

STATE = 'state_dict'
PREFIX = 'diffkd.'  # prefix of the diffusion module's keys
OTHER_SCHEME = re.compile(r'(?!https?:)[\w-]+://')
# errors of a cache folder that cannot be written, in contrast to errors of the network
CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
OTHER_CACHE = 'Set the environment variable TORCH_HOME to a folder that can be written.'
URL_HASH = re.compile(r'-([a-f0-9]{8,})\.pth$')


class DamagedFileError(ValueError):
    """A file that is not a complete checkpoint."""


def read_checkpoint(source: str) -> dict:
    """Read a checkpoint from a path or URL onto the CPU, with torch's ``weights_only`` reader.

    Besides tensors, the reader accepts the objects that mmengine stores in checkpoints (history buffers, NumPy scalars
    and arrays). Downloads are verified against the hash in the file name and cached only when complete.

    Args:
        source (str): Path, http(s) URL, or path in an object store with a file backend of mmengine, such as ``s3://``.

    Returns:
        dict: The checkpoint, with the weights under ``state_dict``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be downloaded, is not a checkpoint, or contains more than plain data.
    """
    content = _read_data(source)
    checkpoint = content if isinstance(content, dict) and STATE in content else {STATE: content}
    _check_state_dict(checkpoint[STATE], source)
    return checkpoint


def check_is_data(source: str) -> None:
    """Check that a checkpoint contains only plain data, because mmengine's loader may execute code in the file.

    Folders (sharded checkpoints) and schemes that only mmengine's loader reads, such as ``torchvision://``, are not
    checked.

    Args:
        source (str): Path, URL, or path in an object store.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_checkpoint`.
    """
    if not osp.isdir(source) and (is_in_store(source) or not OTHER_SCHEME.match(source)):
        _read_data(source)


def without_diffusion_module(state_dict: dict) -> OrderedDict:
    """Return the student's weights, without the diffusion module."""
    return OrderedDict((key, value) for key, value in state_dict.items() if not key.startswith(PREFIX))


def fingerprint(state_dict: dict) -> str:
    """Return a hash of weights that does not depend on the file format."""
    digest = hashlib.sha256()
    for key, value in sorted(state_dict.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_strict(model: nn.Module, state_dict: dict, model_name: str, source: str) -> None:
    """Load weights into a model; all keys and shapes must match.

    The diffusion module of a distilled checkpoint (``diffkd.*``) is ignored, so a distilled student can be a teacher.

    Args:
        model (nn.Module): Model to load the weights into.
        state_dict (dict): The weights.
        model_name (str): Description of the model for the error message.
        source (str): Path or URL of the weights for the error message.

    Raises:
        ValueError: If keys are missing or unexpected, or shapes differ; the message lists the keys.
    """
    state = OrderedDict((re.sub(r'^module\.', '', key), value) for key, value in state_dict.items())
    state = without_diffusion_module(state)
    # modules read the versions in _metadata to convert the keys of old checkpoints
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
    # keys that a module's load hook removed are not missing: the module computes the values itself
    missing = [key for key in result.missing_keys if key not in state and not key.endswith('num_batches_tracked')]
    problems = [
        f'{kind} {_some(keys)}' for kind, keys in (('missing', missing), ('unexpected', result.unexpected_keys)) if keys
    ]
    if problems:
        raise ValueError(f'The weights of {source} do not fit {model_name}: {"; ".join(problems)}.')


def _read_data(source: str):
    """Read a file or URL, and refuse anything but plain data."""
    is_url = source.startswith(('http://', 'https://'))
    path = _download(source) if is_url else osp.expanduser(source)
    if is_in_store(source):
        path = copy_from_store(source)
        try:
            return _read_file(source, path)
        finally:
            remove_copy(path)
    return _read_file(source, path, is_url)


def _read_file(source: str, path: str, is_url: bool = False):
    if osp.isdir(path):
        raise ValueError(f"The checkpoint '{source}' is a folder, probably a sharded checkpoint; give a single file.")
    if not osp.isfile(path):
        raise FileNotFoundError(f"The checkpoint '{source}' does not exist (working directory: {osp.abspath('.')}).")
    name = f'{source} (cached as {path})' if is_url else source
    if executable := executable_format(path):
        raise ValueError(
            f"The checkpoint '{name}' was refused because it is {executable}, which can run code when read; save "
            "only its 'state_dict' with torch.save and use that file."
        )
    try:
        return load_data(path)
    except Exception as error:  # damaged files raise many kinds of errors, such as EINVAL for a negative offset
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        refused = re.search(r'GLOBAL ([\w.]+)', str(error))
        if isinstance(error, UnpicklingError) and refused:
            raise ValueError(
                f"The checkpoint '{name}' was refused because it holds the object {refused.group(1)}, which could run "
                "code when read; save only its 'state_dict' with torch.save and use that file."
            ) from None
        problem = _not_a_checkpoint(name, path)
        if is_url and not URL_HASH.search(path):
            # an interrupted download may have left a partial file, which the next run must not use
            try:
                with suppress(FileNotFoundError):
                    os.remove(path)
                problem += ' The file was removed; the next run downloads it again.'
            except OSError as cause:
                problem += f' It cannot be removed from the cache ({cause.strerror}). {OTHER_CACHE}'
        raise DamagedFileError(problem) from None


def _download(url: str) -> str:
    """Return the cached file of a URL, after downloading it if necessary. All ranks must call this function."""
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    name = osp.basename(urlparse(url).path)
    if name in ('', '.', '..'):
        raise ValueError(f'The URL {url} has no file name.')
    path = osp.join(folder, name)
    digest = URL_HASH.search(path)

    def download():
        if osp.isfile(path):  # also in a cache that cannot be written
            return
        try:
            if folder.startswith('~'):
                raise OSError(errno.ENOENT, 'there is no home folder')
            os.makedirs(folder, exist_ok=True)
            # writes to a temporary file, verifies the hash, then renames
            torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest.group(1), progress=False)
        except (OSError, RuntimeError) as error:
            cure = f' {OTHER_CACHE}' if getattr(error, 'errno', None) in CACHE_ERRORS else ''
            raise ValueError(f'The checkpoint {url} could not be downloaded: {error}.{cure}') from error

    # rank 0 downloads first; ranks with the same cache then find the file
    for my_turn in (is_main_process(), not is_main_process()):
        on_all_ranks(download if my_turn else lambda: None)
    return path


def _check_state_dict(state_dict, name: str) -> None:
    if not isinstance(state_dict, dict):
        raise ValueError(f"The checkpoint '{name}' contains a {type(state_dict).__name__} instead of a state dict.")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"The checkpoint '{name}' has no valid state dict: '{key}' is a {type(value).__name__}, not a tensor."
            )


def _not_a_checkpoint(source: str, path: str) -> str:
    with open(path, 'rb') as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b'<!doctype', b'<html', b'<?xml')):
        what = 'is a web page saved under that name; download it again'
    else:
        what = f'is damaged, possibly truncated when it was saved or copied ({osp.getsize(path)} bytes)'
    return f"'{source}' is not a PyTorch checkpoint: it {what}."


def _shape(tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'scalar'


def _some(items: list, count: int = 4) -> str:
    rest = f' and {len(items) - count} more' if len(items) > count else ''
    return ', '.join(items[:count]) + rest


# methods that pickled history buffers and one-cycle schedulers refer to
BUFFER_METHODS = ('min', 'max', 'mean', 'current')
ANNEALING_METHODS = ('_annealing_cos', '_annealing_linear')


def executable_format(path: str) -> Optional[str]:
    """Return a file's format if torch before 2.6 may run code in it despite ``weights_only``, else None."""
    if tarfile.is_tarfile(path):
        return "in torch's tar format from before 2018"  # CVE-2025-32434
    if zipfile.is_zipfile(path):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if any(osp.basename(name) == 'constants.pkl' for name in archive.namelist()):
                return 'a TorchScript archive'
    return None


def load_data(path: str):
    """Read a file with torch's ``weights_only`` reader, or before torch 2.4, with an equally strict unpickler."""
    admitted = _admitted_globals()
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(admitted):
            return torch.load(path, map_location='cpu', weights_only=True)
    if hasattr(torch.serialization, 'add_safe_globals'):  # torch 2.4
        torch.serialization.add_safe_globals(admitted)
        return torch.load(path, map_location='cpu', weights_only=True)
    return torch.load(path, map_location='cpu', weights_only=False, pickle_module=restricted_pickle(admitted))


def _admitted_globals() -> list:
    """Return the classes and functions, besides tensors, that mmengine's checkpoints refer to."""
    multiarray = (np.core if np.__version__.startswith('1.') else np._core).multiarray
    admitted = [
        HistoryBuffer,
        OneCycleParamScheduler,
        np.ndarray,
        np.dtype,
        _under_name(_known_method, 'builtins', 'getattr'),
    ]
    admitted.append(_under_name(codecs.encode, '_codecs', 'encode'))  # used in pickled bytes
    admitted += {type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):  # module names in NumPy 1 and 2
        admitted += [_under_name(getattr(multiarray, name), module, name) for name in ('_reconstruct', 'scalar')]
    return admitted


def restricted_pickle(admitted: list) -> SimpleNamespace:
    """Create a ``pickle_module`` that accepts only the globals of torch's ``weights_only`` reader and ``admitted``.

    Args:
        admitted (list): Functions and classes to accept in addition.
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
    """Stand-in for ``getattr`` while a checkpoint is unpickled: returns a few known methods, refuses all else."""
    if name not in {HistoryBuffer: BUFFER_METHODS, OneCycleParamScheduler: ANNEALING_METHODS}.get(owner, ()):
        # in the form of torch's own message, which read_checkpoint turns into one for the user
        raise UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def _under_name(function, module: str, name: str):
    """Wrap a function, so that the unpickler finds it under the module and name that checkpoints use."""

    def wrapper(*args):
        return function(*args)

    wrapper.__module__, wrapper.__name__, wrapper.__qualname__ = module, name, name
    return wrapper


RESUME_KEYS = ('meta', 'message_hub')  # keys that a checkpoint needs, besides the weights, to be resumed


def file_to_load(
    load_from: Optional[str],
    resume: Union[bool, str, None],
    work_dir: str,
    folder: str,
    filename_tmpl: str,
    backend_args: Optional[dict] = None,
) -> Optional[str]:
    """Choose the file that a run loads or resumes. All ranks must call this function, and get the same file.

    Args:
        load_from (str, optional): Path or URL, as in the config.
        resume (bool or str): As in the config. True without ``load_from`` selects the newest readable checkpoint.
        work_dir (str): Work dir of the run.
        folder (str): Folder of the checkpoints, also in an object store.
        filename_tmpl (str): Template of the checkpoint names, such as ``'epoch_{}.pth'``.
        backend_args (dict, optional): Arguments of the file backend of ``folder``. Defaults to None.

    Returns:
        str or None: Path or URL; for a file in an object store, a local copy that :func:`remove_copy` removes. None if
        the run starts from scratch.

    Raises:
        ValueError: On all ranks, if on any rank the file does not exist, is damaged, or contains more than plain data.
    """
    named = resume if isinstance(resume, str) else load_from

    def choose() -> Optional[str]:
        if named is not None:  # every rank checks the file, because machines may have different files
            check_is_data(named)
            return named
        if resume and is_main_process():
            return newest_checkpoint(work_dir, folder, filename_tmpl, backend_args)
        return None

    try:
        answer = [on_all_ranks(choose)]
        broadcast_object_list(answer)
        (chosen,) = answer
        store = chosen and _store_of(chosen, folder, backend_args)
        if store is None:
            return chosen
        print_log(f"Copying '{chosen}' from its store.", logger='current')
        return on_all_ranks(lambda: copy_from_store(chosen, store))
    except OSError as error:
        raise ValueError(str(error)) from error


def newest_checkpoint(
    work_dir: str, folder: str, filename_tmpl: str, backend_args: Optional[dict] = None
) -> Optional[str]:
    """Find the newest readable checkpoint of a run, and log a warning for each damaged checkpoint.

    Args:
        work_dir (str): Work dir of the run.
        folder (str): Folder of the checkpoints.
        filename_tmpl (str): Template of the checkpoint names.
        backend_args (dict, optional): Arguments of the file backend of ``folder``. Defaults to None.

    Returns:
        str or None: Path of the checkpoint; None if the run has no checkpoints.

    Raises:
        ValueError: If no checkpoint can be read, or a newer one contains more than plain data.
    """
    files = saved_checkpoints(work_dir, folder, filename_tmpl, backend_args)
    for file in files:
        try:
            if not osp.isdir(file):  # sharded checkpoints are folders
                _check_can_be_resumed(file, _store_of(file, folder, backend_args))
            return file
        except (OSError, DamagedFileError) as error:
            print_log(f'{error} Trying the previous checkpoint.', logger='current', level=WARNING)
    if files:
        raise ValueError(
            f"None of the {len(files)} checkpoints in '{folder}' can be read: start a new run without --resume, in "
            'a different work_dir.'
        )
    print_log(f"No checkpoint to resume in '{folder}'; starting a new run.", logger='current')
    return None


def _check_can_be_resumed(file: str, store: Optional[BaseStorageBackend]) -> None:
    path = file if store is None else copy_from_store(file, store)
    try:
        content = _read_file(file, path)
    finally:
        remove_copy(path)
    checkpoint = content if isinstance(content, dict) else {}
    missing = [key for key in (STATE, *RESUME_KEYS) if key not in checkpoint]
    if missing:
        raise DamagedFileError(f"'{file}' cannot be resumed: the file has no key '{missing[0]}'.")


def saved_checkpoints(work_dir: str, folder: str, filename_tmpl: str, backend_args: Optional[dict] = None) -> List[str]:
    """List the checkpoints of a run, newest first.

    The file named in ``last_checkpoint`` comes first. The rest are sorted by modification time instead of number, since
    an older run may have left checkpoints with higher numbers. Object stores give no time: there, the number decides.
    """
    before, after = re.split(r'\{.*?\}', filename_tmpl, maxsplit=1)
    pattern = re.compile(re.escape(before) + r'(\d+)' + re.escape(after))
    store = _store_of(folder, folder, backend_args)
    if store is None:
        files = [file for file in glob(osp.join(escape(folder), '*')) if pattern.fullmatch(osp.basename(file))]
        files.sort(key=osp.getmtime, reverse=True)
    else:
        names = [name for name in list_store(store, folder) if pattern.fullmatch(name)]
        names.sort(key=lambda name: int(pattern.fullmatch(name)[1]), reverse=True)
        files = [store.join_path(folder, name) for name in names]
    last = last_checkpoint(work_dir)
    if last:
        files = [last] + [file for file in files if osp.abspath(file) != osp.abspath(last)]
    return files


def _store_of(path: str, folder: str, backend_args: Optional[dict]) -> Optional[BaseStorageBackend]:
    """Return the file backend of a checkpoint, or None for a file that mmengine's loader opens.

    Args:
        path (str): The checkpoint.
        folder (str): The run's folder of checkpoints, which has the backend that ``backend_args`` describe.
        backend_args (dict, optional): Arguments of the backend.
    """
    if not is_in_store(path) and osp.exists(path):
        return None
    if backend_args and _scheme(path) == _scheme(folder):
        backend = get_file_backend(path, backend_args=backend_args)
        return None if isinstance(backend, LocalBackend) and not _scheme(path) else backend
    return get_file_backend(path) if is_in_store(path) else None


def _scheme(path: str) -> str:
    return path.partition('://')[0] if '://' in path else ''


def last_checkpoint(work_dir: Union[str, Path]) -> Optional[str]:
    """Return the path in the file ``last_checkpoint`` of a run; None if there is no such file.

    mmengine writes the file in the encoding of the locale, and :class:`.CheckpointHook` in UTF-8 where that fails.
    """
    file = Path(work_dir, 'last_checkpoint')
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        return content.decode('utf-8').strip()
    except UnicodeDecodeError:
        return content.decode(getpreferredencoding(False), 'replace').strip()


NAME = 'mmdiffkd.atomic'


@register_backend(NAME)
class AtomicBackend(LocalBackend):
    """Local backend with atomic writes: files are written under a temporary name, then renamed.

    Where a mount cannot flush or rename files, the file is written as well as the mount can, with a note in the log.
    """

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Write a file.

        Args:
            obj (bytes): Content of the file.
            filepath (str or Path): Path of the file. An existing file is replaced.

        Raises:
            OSError: If the file cannot be written. An existing file is unchanged if the mount can rename files.
        """
        path = str(filepath)
        folder = osp.dirname(path) or '.'
        temporary = f'{path}.tmp'
        try:
            os.makedirs(folder, exist_ok=True)
            _write(temporary, obj)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                _log_once(
                    f"'{folder}' is on a mount that cannot rename files ({error.strerror}): checkpoints are written in "
                    'place. If the run is killed while it saves, --resume uses the checkpoint before.'
                )
                os.remove(temporary)
                _write(path, obj)
            _sync_folder(folder)
        except OSError as error:
            with suppress(OSError):
                os.remove(temporary)
            raise OSError(
                f"'{path}' could not be written: {error.strerror or error}{_free_space(error, folder, len(obj))}. "
                'Earlier files are intact: free disk space or restore access, and restart with --resume.'
            ) from error


# errors of calls that a mount does not support, such as FUSE mounts of object stores
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)


def _write(path: str, content: bytes) -> None:
    """Write a file and flush it to the disk, if its mount can."""
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            _log_once(
                f"'{osp.dirname(path) or '.'}' is on a mount that cannot flush files to the disk ({error.strerror}): "
                'after a power failure, the newest checkpoint may be damaged, and --resume uses the one before.'
            )


def _free_space(error: OSError, folder: str, size: int) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ''
    return f' ({size / 1e6:.1f} MB needed, {shutil.disk_usage(folder).free / 1e6:.1f} MB free)'


@cache
def _log_once(message: str) -> None:
    print_log(message, logger='current', level=WARNING)


def _sync_folder(folder: str) -> None:
    """Flush a folder to disk, so that a rename in the folder survives a power failure. Ignore errors."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
