"""Write files atomically."""

import errno
import os
import os.path as osp
import shutil
from contextlib import suppress
from functools import cache
from logging import WARNING
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import print_log

NAME = 'mmdiffkd.atomic'


@register_backend(NAME)
class AtomicBackend(LocalBackend):
    """Local backend with atomic writes: files are written under a temporary name, then renamed.

    If a mount does not support flushing or renaming, the backend leaves this step out and logs a warning.
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
                    'place. If the run is killed while it saves, --resume uses the previous checkpoint.'
                )
                os.remove(temporary)
                _write(path, obj)
            _sync_folder(folder)
        except OSError as error:
            with suppress(OSError):
                os.remove(temporary)
            cure = _state_and_cure(error, folder, len(obj))
            raise OSError(
                f"'{path}' could not be written: {error.strerror or error}{cure} and restart with --resume."
            ) from error


# error codes of calls that a mount does not support, for example a FUSE mount of an object store
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)


def _write(path: str, content: bytes) -> None:
    """Write a file, and flush it to the disk if the mount supports flushing."""
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
                'after a power failure, the newest checkpoint may be damaged, and --resume uses the previous one.'
            )


def _state_and_cure(error: OSError, folder: str, size: int) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return '. Earlier files are intact: make the folder writable'
    free = shutil.disk_usage(folder).free
    return f' ({size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free). Earlier files are intact: free disk space'


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
