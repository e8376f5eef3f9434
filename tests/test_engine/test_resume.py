import os
import shutil
from pathlib import Path

import pytest

from mmdiffkd.engine.resume import saved_checkpoints


def test_checkpoints_are_sorted_by_time_not_by_number(tmp_path):
    """The folder also contains a checkpoint of a later epoch, from an older run."""
    for index, name in enumerate(('epoch_12.pth', 'epoch_1.pth', 'epoch_2.pth', 'epoch_2.pth.tmp', 'epoch_2_x.pth')):
        (tmp_path / name).write_text('')
        os.utime(tmp_path / name, (index, index))
    found = saved_checkpoints(str(tmp_path), str(tmp_path), 'epoch_{}.pth')
    assert [Path(file).name for file in found] == ['epoch_2.pth', 'epoch_1.pth', 'epoch_12.pth']
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    found = saved_checkpoints(str(tmp_path), str(tmp_path), 'epoch_{}.pth')
    assert [Path(file).name for file in found] == ['epoch_1.pth', 'epoch_2.pth', 'epoch_12.pth']


@pytest.mark.situation(
    'places',
    'Resuming a copy of a work dir',
    '',
    'the run continues from the checkpoint in the copy, although `last_checkpoint` names the original file.',
)
def test_copy_of_a_work_dir(tmp_path):
    original, copy = tmp_path / 'original', tmp_path / 'copy'
    original.mkdir()
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (original / name).write_text('')
    (original / 'last_checkpoint').write_text(str(original / 'epoch_2.pth'))
    shutil.copytree(original, copy)
    found = saved_checkpoints(str(copy), str(copy), 'epoch_{}.pth')
    assert found == [str(copy / 'epoch_2.pth'), str(copy / 'epoch_1.pth')]
