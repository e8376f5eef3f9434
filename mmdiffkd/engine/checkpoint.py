"""Read checkpoints of all kinds as data, without executing code in them."""

import codecs
import errno
import hashlib
import os
import os.path as osp
import pickle
import re
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from pathlib import PurePath
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import BaseStorageBackend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
    load_from_ceph,
)

from .distributed import on_all_ranks
from .object_store import is_in_store, local_copy, missing_backend

STATE = 'state_dict'
PREFIX = 'diffkd.'  # prefix of the diffusion module's keys in a state dict, and of its log keys
OTHER_SCHEME = re.compile(r'(?!https?:)[\w:-]+://')
# error codes of a cache folder that cannot be written; network errors have different codes
CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
OTHER_CACHE = 'Set the environment variable TORCH_HOME to a folder that can be written.'
URL_HASH = re.compile(r'-(?!20\d{6}\.)([a-f0-9]{8,})\.')  # hash in a file name, as in torch.hub; a date is no hash
# entries of a checkpoint that hold tensors but no weights of a model
OTHER_STATE = re.compile(r'optim|sched|scaler|^amp$|^meta$|message_hub|args|hyper|loops|callbacks|rng|loss|criterion')
AVERAGED = re.compile(r'(?<![a-z])ema(?![a-z])|EMA|averag|shadow')  # name of an entry with averaged weights


class DamagedFileError(ValueError):
    """A file that is not a complete checkpoint."""


class MissingPackageError(ValueError):
    """A file that needs a package that is not installed."""


def read_checkpoint(source: str) -> dict:
    """Read a checkpoint from a path or URL onto the CPU, with torch's ``weights_only`` reader.

    Besides tensors, the reader accepts the objects that mmengine stores in checkpoints (history buffers, NumPy scalars
    and arrays). Downloads are verified against the hash in the file name and cached only when complete.

    Args:
        source (str): Path, http(s) URL, model name of mmengine such as ``'torchvision://resnet50'``, or path in an
            object store that has a file backend in mmengine, such as ``s3://``.

    Returns:
        dict: The checkpoint. The weights are under ``state_dict``, even if the file stores them under a different key.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be downloaded, is not a checkpoint, or contains more than plain data.
    """
    return with_state_dict(read_data(source)[1], source, verbose=True)


def check_is_data(source: str) -> str:
    """Check that a checkpoint contains only plain data, because mmengine's loader may execute code in the file.

    mmengine then reads the returned path with :func:`read_checkpoint`. Folders (sharded checkpoints) and schemes that
    only mmengine's loader knows are not checked.

    Args:
        source (str): Path, URL, model name of mmengine such as ``'torchvision://resnet50'``, or path in an object
            store.

    Returns:
        str: Path of the checked file. For a URL, this is the downloaded file. All other sources are returned unchanged.

    Raises:
        FileNotFoundError, ValueError: See :func:`read_checkpoint`.
    """
    return check_and_read(source)[0]


def check_and_read(source: str) -> Tuple[str, Any]:
    """Check a file as in :func:`check_is_data`, and return its path and content. Unchecked files have content None."""
    url = url_of(source)
    if osp.isdir(source) or (OTHER_SCHEME.match(url) and not is_in_store(source) and _has_loader(url)):
        return source, None
    path, content = read_data(source)
    if isinstance(content, dict):
        register_reader(path)
    return path, content


def _has_loader(url: str) -> bool:
    """Return whether mmengine's ``CheckpointLoader`` can load a URL.

    mmengine's default loader for object stores does not count, because it needs the package of the file backend.
    A loader that a user has registered may work without this package.
    """
    loaders = [loader for prefix, loader in CheckpointLoader._schemes.items() if prefix and re.match(prefix, url)]
    return bool(loaders) and loaders[0] is not load_from_ceph


def register_reader(path: str, store: Optional[BaseStorageBackend] = None) -> None:
    """Register a reader for a path, so that mmengine opens this file as data and finds the weights in it.

    Args:
        path (str): The path.
        store (BaseStorageBackend, optional): File backend of the path. None for local files, and for paths whose scheme
            determines the backend. Defaults to None.
    """

    def load_from_local(filename: str, map_location=None) -> dict:  # mmengine logs 'local', the end of this name
        return with_state_dict(read_data(filename, map_location, store)[1], filename, verbose=True)

    CheckpointLoader.register_scheme(f'{re.escape(path)}$', load_from_local, force=True)


def find_state_dict(content: dict) -> Tuple[str, dict, List[str]]:
    """Find the weights in a checkpoint, under any key.

    Args:
        content (dict): Content of a checkpoint: weights, or a dict that holds them, such as ``dict(model=...)``.

    Returns:
        tuple: Name of the entry that holds the weights ('' if the content itself does), the weights, and names of
        entries with averaged weights that are not used. If the checkpoint holds several models, the weights are those
        of all models, with the names of the models as prefixes of the keys.

    Raises:
        KeyError: If there are no weights.
    """
    if isinstance(content.get(STATE), dict):
        unused = [name for name in _state_dicts(content) if AVERAGED.search(name) and name != 'ema_state_dict']
        inner = content[STATE]
        if not inner or _count_tensors(inner):
            return STATE, inner, unused
    found = _state_dicts(content)
    plain = {name: weights for name, weights in found.items() if not AVERAGED.search(name)}
    chosen = plain or found
    if not chosen:
        raise KeyError(STATE)
    unused = [name for name in found if name not in chosen]
    if len(chosen) == 1:
        return (*next(iter(chosen.items())), unused)
    joined = OrderedDict((f'{name}.{key}', value) for name, weights in chosen.items() for key, value in weights.items())
    return "' and '".join(chosen), joined, unused


def with_state_dict(content, source: str, verbose: bool = False) -> dict:
    """Return a checkpoint with its weights under ``state_dict``, and without wrapper prefixes such as ``module.``.

    Args:
        content (Any): Content of the file.
        source (str): Path or URL for messages.
        verbose (bool): Whether to log which weights are used and which entries are left out. Defaults to False.

    Raises:
        ValueError: If the content holds no weights.
    """
    problem = f"The checkpoint '{source}' contains a"
    if not isinstance(content, dict):
        raise ValueError(f'{problem} {type(content).__name__} instead of a state dict.')
    if STATE in content and not isinstance(content[STATE], dict):
        raise ValueError(f'{problem} {type(content[STATE]).__name__} instead of a state dict.')
    try:
        name, weights, unused = find_state_dict(content)
    except KeyError:
        if _holds_arrays(content):
            raise ValueError(
                f"The checkpoint '{source}' holds NumPy arrays instead of tensors; convert them with torch.from_numpy, "
                'save the dict with torch.save, and use that file.'
            ) from None
        keys = ', '.join(map(repr, list(content)[:6])) or 'none'
        raise ValueError(f"The checkpoint '{source}' holds no weights of a model; its keys are {keys}.") from None
    state = OrderedDict((key, value) for key, value in weights.items() if isinstance(value, torch.Tensor))
    metadata = getattr(weights, '_metadata', None)
    notes = []
    if name not in ('', STATE):
        notes.append(f"the weights under '{name}' are used")
    if unused:
        notes.append(f"the averaged weights under '{unused[0]}' are not used")
    if len(state) < len(weights):
        other = [str(key) for key, value in weights.items() if not isinstance(value, torch.Tensor)]
        notes.append(f'{len(other)} entries that are no tensors ({", ".join(other[:3])}) are left out')
    for wrapper in ('module.', '_orig_mod.', 'module.'):  # DDP of a compiled model, or a compiled DDP model
        if sum(key.startswith(wrapper) for key in state) >= max(1, len(state) - 1):
            state = OrderedDict((key[len(wrapper) * key.startswith(wrapper) :], item) for key, item in state.items())
            metadata = metadata and OrderedDict((key[len(wrapper) :], item) for key, item in metadata.items())
    if metadata is not None:
        state._metadata = metadata
    if notes and verbose:
        print_log(f"The checkpoint '{source}': {'; '.join(notes)}.", 'current')
    return {STATE: state} if name == '' else {**content, STATE: state}


def _state_dicts(content: dict, path: str = '', depth: int = 3) -> Dict[str, dict]:
    """Return the dicts of tensors in a checkpoint by their path, such as ``'model'`` and ``'ema.module'``."""
    inner = {}
    for key, value in content.items():
        if depth and isinstance(key, str) and isinstance(value, dict) and not OTHER_STATE.search(key):
            inner.update(_state_dicts(value, f'{path}.{key}'.lstrip('.'), depth - 1))
    own = _count_tensors(content)
    if own and own >= sum(map(_count_tensors, inner.values())):
        return {path: content}
    return inner


def _count_tensors(content: dict) -> int:
    return sum(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())


def _holds_arrays(content: dict) -> bool:
    return any(
        _holds_arrays(value) if isinstance(value, dict) else isinstance(value, np.ndarray)
        for key, value in content.items()
        if not (isinstance(key, str) and OTHER_STATE.search(key))
    )


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


def read_data(source: str, map_location='cpu', store: Optional[BaseStorageBackend] = None) -> Tuple[str, Any]:
    """Read a file, URL or path in a store, and refuse anything but plain data.

    Returns:
        tuple[str, Any]: Local path, or the path in the store, and the content.
    """
    if store is not None or is_in_store(source):
        with local_copy(source, store) as path:
            return source, _read_file(source, path, map_location)
    url = url_of(source)
    is_url = url.startswith(('http://', 'https://'))
    if OTHER_SCHEME.match(url):
        raise MissingPackageError(f"The checkpoint '{source}' cannot be read: {missing_backend(url)}.")
    path = _download(url) if is_url else osp.expanduser(source)
    return path, _read_file(source, path, map_location, url if is_url else None)


def check_no_folder(path: str, source: str) -> None:
    """Raise a ValueError if a path is a folder. The message suggests a checkpoint file in the folder."""
    if osp.isdir(path):
        files = [name for name in sorted(os.listdir(path)) if name.endswith(('.pth', '.pt', '.ckpt', '.safetensors'))]
        example = f", such as '{files[-1]}' in it" if files else ''
        raise ValueError(f"The checkpoint '{source}' is a folder; give a single file{example}.")


def _read_file(source: str, path: str, map_location='cpu', url: Optional[str] = None):
    is_url = url is not None
    check_no_folder(path, source)
    if not osp.isfile(path):
        raise FileNotFoundError(f"The checkpoint '{source}' does not exist (working directory: {osp.abspath('.')}).")
    name = f'{source} (cached as {path})' if is_url else source
    if executable := executable_format(path):
        raise ValueError(
            f"The checkpoint '{name}' was refused because it is {executable}, which can run code when read; save "
            "only its 'state_dict' with torch.save and use that file."
        )
    try:
        return _read_safetensors(path, name) if _is_safetensors(path) else load_data(path, map_location)
    except MissingPackageError:
        raise
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
        if is_url and not URL_HASH.search(_url_name(url)):
            # an interrupted download may have left a partial file, which the next run must not use
            try:
                with suppress(FileNotFoundError):
                    os.remove(path)
                problem += ' The file was removed; the next run downloads it again.'
            except OSError as cause:
                problem += f' It cannot be removed from the cache ({cause.strerror}). {OTHER_CACHE}'
        raise DamagedFileError(problem) from None


def _is_safetensors(path: str) -> bool:
    """Return whether a file starts like a safetensors file: the length of a JSON header, then the header."""
    with open(path, 'rb') as file:
        start = file.read(9)
    return start[8:] == b'{' and not any(start[5:8])


def _read_safetensors(path: str, name: str) -> dict:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingPackageError(
            f"The checkpoint '{name}' is a safetensors file: run 'pip install safetensors' to read it."
        ) from error
    return load_file(path)


# functions that return mmengine's model names and their URLs, by the scheme of the names
MODEL_LISTS = dict(
    torchvision=get_torchvision_models,
    modelzoo=get_torchvision_models,
    openmmlab=get_external_models,
    mmcls=get_mmcls_models,
)


def url_of(source: str) -> str:
    """Return the URL of one of mmengine's model names, such as ``'torchvision://resnet50'``; else the source itself."""
    scheme, _, name = source.partition('://')
    scheme = scheme.replace('open-mmlab', 'openmmlab')
    if not name or scheme not in MODEL_LISTS:
        return source
    urls = {key: url for key, url in MODEL_LISTS[scheme]().items() if url}
    if scheme == 'openmmlab':
        name = get_deprecated_model_names().get(name, name)
    if name not in urls:
        nearest = ', '.join(f"'{key}'" for key in get_close_matches(name, urls, cutoff=0.3))
        raise ValueError(f"mmengine knows no model '{source}'; the nearest names are {nearest or 'none'}.")
    return urls[name] if urls[name].startswith('http') else source


def _url_name(url: str) -> str:
    return osp.basename(urlparse(url).path)


def _download(url: str) -> str:
    """Return the cached file of a URL, after downloading it if necessary. All ranks must call this function."""
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    name = _url_name(url)
    if name in ('', '.', '..'):
        raise ValueError(f'The URL {url} does not end with a file name; give the URL of a checkpoint file.')
    digest = URL_HASH.search(name)
    if digest is None:  # different URLs may end with the same file name, so add a hash of the URL
        stem, suffix = osp.splitext(name)
        name = f'{stem}-{hashlib.sha256(url.encode()).hexdigest()[:16]}{suffix}'
    path = osp.join(folder, name)
    if digest is None and osp.isfile(path):
        date = datetime.fromtimestamp(osp.getmtime(path)).date()
        print_log(f'{url} was downloaded on {date}; to download it again, delete {path}.', 'current')

    def download():
        if osp.isfile(path):  # no download is needed, even if the cache cannot be written
            return
        try:
            if folder.startswith('~'):
                raise OSError(errno.ENOENT, 'there is no home folder')
            os.makedirs(folder, exist_ok=True)
            # this function writes to a temporary file, verifies the hash, then renames the file
            torch.hub.download_url_to_file(url, path, hash_prefix=digest and digest.group(1), progress=False)
        except (OSError, RuntimeError) as error:
            cure = f' {OTHER_CACHE}' if getattr(error, 'errno', None) in CACHE_ERRORS else ''
            raise ValueError(f'The checkpoint {url} could not be downloaded: {error}.{cure}') from error

    # rank 0 downloads first; ranks with the same cache then find the file
    for my_turn in (is_main_process(), not is_main_process()):
        on_all_ranks(download if my_turn else lambda: None)
    return path


def _not_a_checkpoint(source: str, path: str) -> str:
    with open(path, 'rb') as file:
        beginning = file.read(512)
    start = beginning.lstrip().lower()
    what = f'is damaged, possibly truncated when it was saved or copied ({osp.getsize(path)} bytes)'
    if start.startswith(b'\x80') and LEGACY_MAGIC not in start:
        what = 'is a pickle file that torch.save did not write, as in Detectron2; convert it to a dict of tensors'
    if start and not start.startswith(b'pk') and not set(beginning) - TEXT:
        what = 'is a text file, such as a config or the error message of a server; give the file of the weights'
    for signature, other in OTHER_FILES.items():
        if start.startswith(signature):
            what = other
    if zipfile.is_zipfile(path):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if not any(osp.basename(name) == 'data.pkl' for name in archive.namelist()):
                is_npz = all(name.endswith('.npy') for name in archive.namelist())
                what = ARRAYS if is_npz else ARCHIVE
    return f"'{source}' is not a PyTorch checkpoint: it {what}."


LEGACY_MAGIC = b'l\xfc\x9cf\xf9 j\xa8p\x19.'  # marks files that torch before 1.6 saved; in lower case
ARCHIVE = 'is an archive; unpack it and use the checkpoint in it'
ARRAYS = 'holds NumPy arrays; convert them with torch.from_numpy and save the dict with torch.save'
TEXT = {*b'\t\n\r\f', *range(32, 127), *range(128, 256)} - {0x80}  # without 0x80, which begins pickle files
WEB_PAGE = 'is a web page saved under that name; download it again'
# first bytes, in lower case, of files that are not checkpoints but often given as one
OTHER_FILES = {
    b'<!doctype': WEB_PAGE,
    b'<html': WEB_PAGE,
    b'<?xml': WEB_PAGE,
    b'version https://git-lfs': "is a pointer of Git LFS; run 'git lfs pull' in its repository",
    b'{': "is a JSON file; use the file of weights, such as 'model.safetensors', or join several into one",
    b'\x93numpy': ARRAYS,
    b'\x89hdf': 'is an HDF5 file, such as Keras writes',
    b'\x1f\x8b': ARCHIVE,
}


# methods that pickled history buffers and one-cycle schedulers refer to
BUFFER_METHODS = ('min', 'max', 'mean', 'current')
ANNEALING_METHODS = ('_annealing_cos', '_annealing_linear')


EXPORTED = {'serialized_exported_program.json', 'archive_format'}  # file names in an archive of torch.export


def executable_format(path: str) -> Optional[str]:
    """Return the format of a file if torch before 2.6 may run code in it, even with ``weights_only``; else None.

    Newer versions of torch refuse to read these formats with ``weights_only``.
    """
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive, suppress(tarfile.TarError, OSError, EOFError):
            if not {'storages', 'tensors', 'pickle'} & {osp.basename(name) for name in archive.getnames()}:
                raise ValueError(f"'{path}' is not a PyTorch checkpoint: it {ARCHIVE}.")
        return "in torch's tar format from before 2018"  # CVE-2025-32434
    if zipfile.is_zipfile(path):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            names = {osp.basename(name) for name in archive.namelist()}
            if EXPORTED & names:
                return 'a program of torch.export'
            if 'constants.pkl' in names:
                return 'a TorchScript archive'
    return None


def load_data(path: str, map_location='cpu'):
    """Read a file with torch's ``weights_only`` reader, or before torch 2.4, with an equally strict unpickler."""
    admitted = _admitted_globals()
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(admitted):
            return torch.load(path, map_location=map_location, weights_only=True)
    if hasattr(torch.serialization, 'add_safe_globals'):  # torch 2.4
        torch.serialization.add_safe_globals(admitted)
        return torch.load(path, map_location=map_location, weights_only=True)
    return torch.load(path, map_location=map_location, weights_only=False, pickle_module=restricted_pickle(admitted))


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
    # command-line arguments, which the training scripts of some projects save in checkpoints
    admitted += [Namespace, *(_under_name(PurePath, 'pathlib', kind) for kind in ('PosixPath', 'WindowsPath'))]
    admitted.append(_under_name(codecs.encode, '_codecs', 'encode'))  # pickled bytes objects refer to it
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
    """Replace ``getattr`` while a checkpoint is unpickled: return a few known methods, and refuse all other names."""
    if name not in {HistoryBuffer: BUFFER_METHODS, OneCycleParamScheduler: ANNEALING_METHODS}.get(owner, ()):
        # same form as torch's message; _read_file replaces both by a message for the user
        raise UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def _under_name(function, module: str, name: str):
    """Wrap a function, so that the unpickler finds it under the module and name that checkpoints use."""

    def wrapper(*args):
        return function(*args)

    wrapper.__module__, wrapper.__name__, wrapper.__qualname__ = module, name, name
    return wrapper
