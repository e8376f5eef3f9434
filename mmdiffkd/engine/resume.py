"""Choose the checkpoint that a run loads or resumes."""

import os.path as osp
import re
from glob import escape, glob
from locale import getpreferredencoding
from logging import WARNING
from pathlib import Path
from typing import List, Optional, Union

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import BaseStorageBackend, LocalBackend, get_file_backend
from mmengine.logging import print_log

from .checkpoint import STATE, DamagedFileError, check_and_read, read_data, register_reader, with_state_dict
from .distributed import on_all_ranks
from .object_store import is_in_store, list_store

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
        str or None: Path of the checked file, see :func:`check_is_data`; None if the run starts from scratch.

    Raises:
        ValueError: On all ranks, if on any rank the file does not exist, is damaged, or contains more than plain data.
    """
    named = resume if isinstance(resume, str) else load_from

    def choose() -> Optional[str]:
        if named is None:
            find = resume and is_main_process()
            return newest_checkpoint(work_dir, folder, filename_tmpl, backend_args) if find else None
        path, content = check_and_read(named)  # on every rank, because machines may have different files
        if content is not None:
            checkpoint = with_state_dict(content, named)
            missing = [key for key in RESUME_KEYS if key not in checkpoint]
            if resume and missing:
                raise ValueError(
                    f"'{named}' cannot be resumed: the file has no key '{missing[0]}'; to start from its weights, "
                    'use load_from without resume.'
                )
        return path

    try:
        path = on_all_ranks(choose)
    except OSError as error:
        raise ValueError(str(error)) from error
    if named is None:
        answer = [path]
        broadcast_object_list(answer)
        (path,) = answer
        if path is not None:
            register_reader(path, _store_of(path, folder, backend_args))
    return path


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
        ValueError: If all checkpoints are damaged, or a checkpoint that is tried contains more than plain data.
    """
    files = saved_checkpoints(work_dir, folder, filename_tmpl, backend_args)
    for file in files:
        try:
            if not osp.isdir(file):  # a folder is a sharded checkpoint, which is not checked
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
    _, content = read_data(file, store=store)
    checkpoint = content if isinstance(content, dict) else {}
    missing = [key for key in (STATE, *RESUME_KEYS) if key not in checkpoint]
    if missing:
        raise DamagedFileError(f"'{file}' cannot be resumed: the file has no key '{missing[0]}'.")


def saved_checkpoints(work_dir: str, folder: str, filename_tmpl: str, backend_args: Optional[dict] = None) -> List[str]:
    """List the checkpoints of a run, newest first.

    The file named in ``last_checkpoint`` comes first. The rest are sorted by modification time instead of number, since
    an older run may have left checkpoints with higher numbers. Files in object stores are sorted by number, because the
    stores do not report this time.
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
        # last_checkpoint holds an absolute path: in a copy of the work dir, use the file of the copy
        own = [file for file in files if osp.basename(file) == osp.basename(last)]
        last = own[0] if own else last
        files = [last] + [file for file in files if osp.abspath(file) != osp.abspath(last)]
    return files


def _store_of(path: str, folder: str, backend_args: Optional[dict]) -> Optional[BaseStorageBackend]:
    """Return the file backend of a checkpoint, or None for a file that mmengine's loader opens.

    Args:
        path (str): The checkpoint.
        folder (str): Folder of the run's checkpoints.
        backend_args (dict, optional): Arguments of the file backend of ``folder``.
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

    mmengine writes the file in the encoding of the locale, and :class:`.CheckpointHook` in UTF-8 if this encoding
    lacks a character.
    """
    file = Path(work_dir, 'last_checkpoint')
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        return content.decode('utf-8').strip()
    except UnicodeDecodeError:
        return content.decode(getpreferredencoding(False), 'replace').strip()
