"""The stages for a GPU machine start and write their tables, also on failure and when their time is over."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu.__main__ import STAGES, Kit, Part, make_parts, select
from benchmarks.gpu.comparison import METHODS, rows_of
from tests.conftest import ROOT


def kit_args(**changes):
    defaults = dict(smoke=False, packages=None, site=Path('site'), data=Path('data'), teacher=Path('teacher.pth'))
    return SimpleNamespace(**{**defaults, 'device': 'cpu', **changes})


def test_limits():
    """Every stage takes less than 8 minutes, and all take less than 22 minutes."""
    parts = make_parts(kit_args(), Path('out'))
    assert all(select(parts, [stage])[1] < 8 * 60 for stage in STAGES)
    assert select(parts, [])[1] < 22 * 60


def test_results_never_vanish(tmp_path):
    """A table of its own, a failure and a part without time: each has a page, and the index lists all of them."""
    page = "import pathlib; pathlib.Path(r'{}').write_text('# Table')"
    parts = [
        Part('neck', 'good', 'Good', 60, ['-c', page.format(tmp_path / 'good.md')]),
        Part('neck', 'bad', 'Bad', 60, ['-c', "raise SystemExit('no memory')"]),
        Part('deeppcb', 'slow', 'Slow', 1, ['-c', "print('epoch 3', flush=True); import time; time.sleep(60)"]),
    ]
    assert not Kit(tmp_path, 'cpu', tmp_path / 'site').run(parts)
    index = (tmp_path / 'index.md').read_text()
    assert '| neck | [good](good.md) | done |' in index
    assert '[bad](bad.md) | failed (exit code 1) |' in index and '[slow](slow.md) | time over after 1 s |' in index
    assert (tmp_path / 'good.md').read_text() == '# Table'
    bad, slow = ((tmp_path / f'{name}.md').read_text() for name in ('bad', 'slow'))
    assert bad.startswith('# Bad') and 'no memory' in bad and 'PyTorch' in bad
    assert '    epoch 3' in slow and 'time over after 1 s' in slow
    # a later call keeps the rows of earlier calls
    assert Kit(tmp_path, 'cpu', tmp_path / 'site').run(parts[:1])
    assert 'slow.md' in (tmp_path / 'index.md').read_text()


def test_comparison_shows_runs_that_have_not_ended(tmp_path):
    assert [row['result'] for row in rows_of(tmp_path)] == ['not started'] * 3
    record = dict(arm='alone', seed=0, val={'coco/bbox_mAP': 0.214}, test={'coco/bbox_mAP': 0.2})
    (tmp_path / 'results.jsonl').write_text(json.dumps(record) + '\n')
    (tmp_path / 'compare.json').write_text(json.dumps(dict(costs=dict(plus=dict(time=2.31, peak_mib=40.4)))))
    log = tmp_path / 'plus' / 'seed0' / '1' / 'vis_data'
    log.mkdir(parents=True)
    (log / 'scalars.json').write_text('{"iter": 50, "loss": 1.0}\n{"it')
    alone, cwd_head, plus = rows_of(tmp_path)
    assert [row['method'] for row in (alone, cwd_head, plus)] == list(METHODS)
    assert (alone['result'], alone['AP, val'], alone['AP, test']) == ('done', '21.4', '20.0')
    assert cwd_head['result'] == 'not started' and plus['result'] == 'not ended: iteration 50'
    assert plus['time of an iteration, alone = 1'] == '2.31' and plus['peak, MiB'] == '40'


def test_page_of_tests_names_tests_that_did_not_run(tmp_path):
    text = 'def test_one():\n    pass\ndef test_two():\n    import os; os._exit(9)\ndef test_three():\n    pass\n'
    (tmp_path / 'test_file.py').write_text(text)
    command = [sys.executable, '-m', 'pytest', '-p', 'benchmarks.gpu.pytest_page', '--page', 'page.md', 'test_file.py']
    done = subprocess.run(command, cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode == 9, done.stdout + done.stderr
    rows = [line.split(' | ')[:2] for line in (tmp_path / 'page.md').read_text().splitlines() if '| test_' in line]
    assert rows == [['| test_one', 'passed'], ['| test_two', 'not run'], ['| test_three', 'not run']]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a busy CPU, a stage takes longer than other tests
@pytest.mark.parametrize('stage', STAGES)
def test_smoke(stage, tmp_path):
    command = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.gpu', stage, '--device', 'cpu', '--smoke']
    done = subprocess.run([*command, '--out', tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    index = json.loads((tmp_path / 'index.json').read_text())
    assert {row['stage'] for row in index.values()} == {stage}
    for name, row in index.items():
        text = (tmp_path / f'{name}.md').read_text()
        assert row['result'] == 'done' and 'PyTorch' in text and '| ---' in text
