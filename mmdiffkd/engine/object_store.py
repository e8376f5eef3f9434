"""Checkpoints in object stores, which mmengine's file backends read and write."""

import os.path as osp
import tempfile
from contextlib import contextmanager
from typing import Iterator, List, Optional

from mmengine.fileio import BaseStorageBackend, get_file_backend
from mmengine.fileio.backends import prefix_to_backends
from mmengine.logging import print_log

from mmdiffkd.utils.check_config import closest_names


def is_in_store(source: str) -> bool:
    """Return whether one of mmengine's file backends reads a path, such as ``s3://bucket/epoch_1.pth``.

    The result is False for local paths, for http(s) URLs, and if the backend needs a package that is not installed.
    """
    scheme, separator, _ = source.partition('://')
    if not separator or scheme in ('http', 'https') or scheme.split(':')[-1] not in prefix_to_backends:
        return False
    try:
        get_file_backend(source)
    except ImportError:
        return False  # mmengine may still have a checkpoint loader for the scheme
    return True


def missing_backend(source: str) -> str:
    """Return the clause of an error message that says why no file backend of mmengine can read a path."""
    scheme = source.partition('://')[0].split(':')[-1]  # 'petrel:s3://' is a path of s3 in mmengine
    if scheme == 'file':
        return "use the path without 'file://'"
    if scheme in prefix_to_backends:
        try:
            get_file_backend(source)
        except ImportError as error:
            return f"the package of the file backend for '{scheme}://' is not installed ({str(error).rstrip('.')})"
    known = sorted({'http', 'https', *filter(None, prefix_to_backends)})
    return f"mmengine has no file backend for '{scheme}://'; the nearest are {closest_names(scheme, known)}"


@contextmanager
def local_copy(source: str, store: Optional[BaseStorageBackend] = None) -> Iterator[str]:
    """Copy a checkpoint from an object store to a temporary file, which is removed at the end of the context.

    Args:
        source (str): Path in the store.
        store (BaseStorageBackend, optional): mmengine's file backend. None chooses it by the scheme of the path.

    Raises:
        OSError: If the store cannot be reached or has no such file.

    >>> with local_copy('s3://bucket/epoch_1.pth') as path:
    ...     content = torch.load(path)
    """
    try:
        content = (store or get_file_backend(source)).get(source)
    except Exception as error:  # each client of an object store has its own error classes
        raise OSError(f"The checkpoint '{source}' could not be read from its store: {error}") from error
    with tempfile.TemporaryDirectory(prefix='mmdiffkd-') as folder:
        path = osp.join(folder, osp.basename(source))
        with open(path, 'wb') as file:
            file.write(content)
        yield path


def list_store(store: BaseStorageBackend, folder: str) -> List[str]:
    """Return the names of the files in a folder of an object store; an empty list if the store cannot list files."""
    try:
        return [osp.basename(name) for name in store.list_dir_or_file(folder, list_dir=False)]
    except Exception as error:  # each client of an object store has its own error classes
        print_log(
            f"The checkpoints in '{folder}' cannot be listed: {str(error) or type(error).__name__}", logger='current'
        )
        return []
