import json
import statistics
import subprocess
import sys

import pytest
import torch

from benchmarks import measure
from tests.conftest import ROOT

SMALL = {
    'neck': ['--levels', 'tiny', '--channels', '8', '--rounds', '2'],
    'scaling': ['--levels', 'tiny', '--rounds', '2'],
    'analytic': ['configs/deeppcb/diffkd_retinanet-r50_retinanet-r18_24e_deeppcb.py', '--size', '128', '128'],
    'iteration': [
        'configs/deeppcb/diffkd_retinanet-r50_retinanet-r18_24e_deeppcb.py',
        *('--size', '128', '160', '--batch', '2', '--rounds', '2'),
    ],
}


def test_functions_run_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ('one', 'two')}
    times = measure.in_turn(functions, rounds=3, warmup=1)
    assert calls == ['one', 'two'] * 4
    assert {name: len(seconds) for name, seconds in times.items()} == dict(one=3, two=3)


def test_ratios_are_per_round():
    figures = measure.ratios([2.0, 30.0, 4.0], [1.0, 10.0, 2.0])
    low, median, high = statistics.quantiles([2, 3, 2], n=4)
    assert figures == dict(ms=4000.0, ratio=median, low=low, high=high)


def test_peak_memory():
    x = torch.ones(2**18)

    def step():
        y = x + 1
        del y
        return (x + 1) + (x + 2)

    assert measure.peak_mib(step) == pytest.approx(3, abs=0.1)


def test_table():
    rows = [dict(name='one', ms=1), dict(name='two', ms=2)]
    assert measure.markdown(rows) == '| name | ms |\n| --- | ---: |\n| one | 1 |\n| two | 2 |'


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_benchmarks_write_their_page(name, tmp_path):
    page = tmp_path / 'page.md'
    command = [sys.executable, '-W', 'ignore', '-m', f'benchmarks.{name}', *SMALL[name], '--page', str(page)]
    command += [] if name == 'analytic' else ['--threads', '1']
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    text, data = page.read_text(), json.loads(page.with_suffix('.json').read_text())
    assert f'python -m benchmarks.{name}' in text and data['versions'] in text
    assert all(f'| {key} |' in text for key in data['results'])
    assert page.with_suffix('.png').exists() == (name == 'iteration')
