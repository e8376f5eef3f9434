"""Checkpoints in object stores, which mmengine's file backends read and write."""

import os.path as osp
import shutil
import tempfile
from functools import cache
from typing import List, Optional

from mmengine.fileio import BaseStorageBackend, get_file_backend
from mmengine.fileio.backends import prefix_to_backends
from mmengine.logging import print_log


def is_in_store(source: str) -> bool:
    """Return whether one of mmengine's file backends reads a path, such as ``s3://bucket/epoch_1.pth``.

    Local paths and URLs do not count.
    """
    scheme, separator, _ = source.partition('://')
    return bool(separator) and scheme not in ('http', 'https') and scheme.split(':')[-1] in prefix_to_backends


def copy_from_store(source: str, backend: Optional[BaseStorageBackend] = None) -> str:
    """Copy a checkpoint from an object store to a temporary file, and return its path; see :func:`remove_copy`.

    Args:
        source (str): Path in the store.
        backend (BaseStorageBackend, optional): mmengine's file backend. None chooses it by the scheme of the path.

    Raises:
        OSError: If the store cannot be reached or has no such file.
    """
    try:
        content = (backend or get_file_backend(source)).get(source)
    except Exception as error:  # every client of a store has its own errors
        raise OSError(f"The checkpoint '{source}' could not be read from its store: {error}") from error
    path = osp.join(tempfile.mkdtemp(dir=_copies().name), osp.basename(source))
    with open(path, 'wb') as file:
        file.write(content)
    return path


def remove_copy(path: Optional[str]) -> None:
    """Remove a temporary file of :func:`copy_from_store`. Other files are kept."""
    if path is not None and osp.dirname(osp.dirname(path)) == _copies().name:
        shutil.rmtree(osp.dirname(path), ignore_errors=True)


@cache
def _copies() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix='mmdiffkd-')


def list_store(store: BaseStorageBackend, folder: str) -> List[str]:
    """Return the names of the files in a folder of an object store, or none if the store cannot list files."""
    try:
        return [osp.basename(name) for name in store.list_dir_or_file(folder, list_dir=False)]
    except Exception as error:  # every client of a store has its own errors
        print_log(
            f"The checkpoints in '{folder}' cannot be listed: {str(error) or type(error).__name__}", logger='current'
        )
        return []
