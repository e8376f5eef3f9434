"""The table in docs/faults.md is made by the tests: each writes, or else checks, its own row."""

import fcntl
import os
import re

from tests.conftest import ROOT

FILE = ROOT / 'docs' / 'faults.md'
FAULTS = {
    'NaN in an image of the batch',
    "NaN in an image of the batch, `NonFiniteHook(policy='skip')`",
    'a batch of one image',
    'all checkpoints damaged',
    'code in a checkpoint (teacher, `load_from`, `--resume`, `tools/test.py`)',
    "download of the teacher's weights breaks off, a hash in the file's name",
    "download of the teacher's weights breaks off, no hash in the file's name",
    'images of unequal size in a batch',
    'newest checkpoint truncated or damaged',
    'no ground truth in one image',
    'no ground truth in the batch',
    'no room left while a checkpoint is written (here: the kernel lets no file grow)',
    'one of two processes dies',
    'process killed (SIGKILL) in the middle of an epoch',
    'process killed (SIGKILL) in the middle of writing a checkpoint, `max_keep_ckpts=1`',
    'teacher file replaced during the run',
}
HEAD = '| fault | what happens | what is said |\n|---|---|---|\n'


def row(fault: str, happens: str, said: str = '') -> None:
    """Compare a row with the table; with ``MMDIFFKD_WRITE_FAULTS=1`` write it.

    Args:
        fault (str): What goes wrong.
        happens (str): What the test has seen.
        said (str): The message, as printed; paths and sizes are left out.
    """
    assert fault in FAULTS, fault
    said = re.sub(r"'?/[^\s:')]*/([^\s/:')]*)'?", r'\1', said)
    said = re.sub(r'\d+\.\d+ MB', '... MB', said).replace('|', '/')
    line = f'| {fault} | {happens} | {said} |'
    if not os.environ.get('MMDIFFKD_WRITE_FAULTS'):
        assert line in FILE.read_text().splitlines(), f'docs/faults.md does not say:\n{line}'
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
    """The fault of a row."""
    return line[2:].split(' | ')[0]
