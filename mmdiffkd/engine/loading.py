"""What a run begins from: the checkpoint that is resumed or loaded, checked before upstream reads it."""

import os.path as osp
import re
from glob import escape, glob
from logging import WARNING
from typing import List, Optional, Union

from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from mmdiffkd.utils import DamagedFileError, check_is_data, read_checkpoint

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
