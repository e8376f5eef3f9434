"""Reading files with torch in a way that runs nothing in them."""

import codecs
import os.path as osp
import pickle
import tarfile
import zipfile
from contextlib import suppress
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Optional

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleParamScheduler

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
