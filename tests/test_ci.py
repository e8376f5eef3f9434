"""Run the CI script with a fake ``make`` that prints its arguments; check order and deadline of the slow tests."""

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, pytest_collection_modifyitems, pytest_runtest_setup

MAKE = """#!/bin/sh
echo "make $*"
[ "$1" = "$FAILS" ] && exit 2
case $1 in *test*) echo "====== 7 passed, 1 skipped, 2 warnings in 3.21s (0:00:03) ======";; esac
"""


@pytest.fixture
def ci(tmp_path):
    (tmp_path / 'make').write_text(MAKE)
    (tmp_path / 'make').chmod(0o755)

    def run(fails=''):
        env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', FAILS=fails)
        return subprocess.run(['bash', ROOT / '.ci' / 'run'], env=env, capture_output=True, text=True)

    return run


def rows(output):
    """Return the columns "result" and "tests" of the printed table, by step."""
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in output.splitlines() if line.startswith('| ')]
    return {step: (result, tests) for step, result, _, tests in cells[1:]}


def test_both_families_run_and_a_table_is_printed(ci):
    done = ci()
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert list(found) == ['env', 'env-openmmlab', 'lint', 'test', 'test-openmmlab', 'test-all, slow']
    assert found['lint'] == ('passed', '')
    assert found['test'] == ('passed', '7 passed, 1 skipped (no data or no time), 2 warnings')
    assert 'make test-all ARGS=-m slow --rotate' in done.stdout


def test_failed_step_fails_and_skips_the_slow_tests(ci):
    done = ci('test')
    found = rows(done.stdout)
    assert done.returncode != 0 and found['test'] == ('FAILED', '')
    assert found['test-openmmlab'][0] == 'passed' and 'test-all, slow' not in found


def test_failed_environment_skips_all_steps(ci):
    done = ci('env')
    assert done.returncode != 0 and list(rows(done.stdout)) == ['env']


def config(**options):
    return SimpleNamespace(getoption=lambda name: options.get(name[2:]))


def test_first_file_depends_on_the_commit():
    def order(commit):
        items = [SimpleNamespace(path=Path(name), number=number) for name in 'abcde' for number in (1, 2)]
        pytest_collection_modifyitems(config(rotate=commit), items)
        return [f'{item.path}{item.number}' for item in items]

    orders = [order(f'commit {number}') for number in range(20)]
    assert order('commit 0') == orders[0]
    assert {files[0] for files in orders} == {'a1', 'b1', 'c1', 'd1', 'e1'}
    assert all(''.join(files[::2]) in 'a1b1c1d1e1' * 2 and sorted(files) == sorted(orders[0]) for files in orders)


def test_no_test_starts_after_the_deadline():
    pytest_runtest_setup(SimpleNamespace(config=config(until=time.time() + 60)))
    pytest_runtest_setup(SimpleNamespace(config=config()))
    with pytest.raises(pytest.skip.Exception, match='no time left'):
        pytest_runtest_setup(SimpleNamespace(config=config(until=time.time() - 1)))
