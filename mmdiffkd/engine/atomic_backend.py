import os
import os.path as osp
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend

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
