"""Rows of the table in docs/help/faults.md: each test checks or writes its own row."""

import fcntl
import os
import re

from tests.conftest import ROOT

FILE = ROOT / 'docs' / 'help' / 'faults.md'
FAULTS = {
    'NaN in an image of the batch',
    "NaN in an image of the batch, `NonFiniteHook(policy='skip')`",
    'all checkpoints are damaged',
    'batch of one image',
    'code in a checkpoint (teacher, `load_from`, `--resume`, `tools/test.py`)',
    'disk full while a checkpoint is written (simulated by a limit of the file size)',
    'images of different sizes in a batch',
    "interrupted download of the teacher's weights, hash in the file name",
    "interrupted download of the teacher's weights, no hash in the file name",
    'newest checkpoint is truncated or damaged',
    'no ground truth in one image',
    'no ground truth in the batch',
    'one of two processes is killed (SIGKILL)',
    'process is killed (SIGKILL) in the middle of an epoch',
    'process is killed (SIGKILL) while it writes a checkpoint, `max_keep_ckpts=1`',
    'teacher file is replaced during the run',
}
HEAD = '| fault | behavior | message |\n|---|---|---|\n'


def row(fault: str, behavior: str, message: str = '') -> None:
    """Check that the table contains a row; with ``MMDIFFKD_WRITE_FAULTS=1``, write it.

    Args:
        fault (str): One of ``FAULTS``.
        behavior (str): Behavior that the test has verified.
        message (str): Printed message. Paths and sizes are removed from it. Defaults to ''.
    """
    assert fault in FAULTS, fault
    message = re.sub(r"'?/[^\s:')]*/([^\s/:')]*)'?", r'\1', message)
    message = re.sub(r'\d+\.\d+ MB', '... MB', message).replace('|', '/')
    line = f'| {fault} | {behavior} | {message} |'
    if not os.environ.get('MMDIFFKD_WRITE_FAULTS'):
        assert line in FILE.read_text().splitlines(), f'docs/help/faults.md lacks this row:\n{line}'
        return
    with open(FILE, 'r+') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before, rest = file.read().split(HEAD)
        rows, _, after = rest.partition('\n\n')
        lines = {name_of(text): text for text in rows.splitlines() if text}
        lines[fault] = line
        file.seek(0)
        file.write(before + HEAD + '\n'.join(sorted(lines.values())) + '\n\n' + after)
        file.truncate()


def name_of(line: str) -> str:
    """Return the fault of a row."""
    return line[2:].split(' | ')[0]
