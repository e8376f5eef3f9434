"""The table in docs/faults.md is made by the tests: each writes, or else checks, its own row."""

import fcntl
import os
import re

from tests.conftest import ROOT

FILE = ROOT / 'docs' / 'faults.md'
HEAD = '| fault | what happens | what is said |\n|---|---|---|\n'


def row(fault: str, happens: str, said: str = '') -> None:
    """Compare a row with the table; with ``MMDIFFKD_WRITE_FAULTS=1`` write it.

    Args:
        fault (str): What goes wrong.
        happens (str): What the test has seen.
        said (str): The message, as printed; paths and sizes are left out.
    """
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
        lines = {text.split(' | ')[0]: text for text in rows.splitlines() if text}
        lines[line.split(' | ')[0]] = line
        file.seek(0)
        file.write(before + HEAD + '\n'.join(sorted(lines.values())) + '\n\n' + after)
        file.truncate()
