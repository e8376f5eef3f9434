import math

import pytest
from scipy import stats

from mmdiffkd.visualization import differences
from mmdiffkd.visualization.differences import baseline_of, difference
from mmdiffkd.visualization.runs import read_groups
from tests.test_visualization import logs

METRIC = 'coco/bbox_mAP'


def compare(tmp_path, alone, other):
    """Compare two runs with a validation per seed; None is a seed without validation."""
    named = []
    for name, values in dict(alone=alone, other=other).items():
        for seed, value in enumerate(values):
            records = [logs.train(10), *([] if value is None else [logs.val(10, value)])]
            named.append((name, logs.write(tmp_path / f'{name}{seed}', records)))
    groups = read_groups(named)
    baseline = baseline_of(groups)
    assert baseline is groups[0]
    return difference(groups[1], baseline, METRIC)


def test_paired_interval(tmp_path):
    alone, other = (0.20, 0.24, 0.25), (0.25, 0.27, 0.31)
    mean, half = compare(tmp_path, alone, other)
    expected = stats.ttest_rel(other, alone).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(expected))


@pytest.mark.parametrize(
    'alone, other, expected',
    [
        ((0.2,), (0.25,), 0.05),
        ((0.2, 0.3), (0.4,), 0.15),  # different numbers of seeds
        ((0.2, 0.3), (0.4, None), 0.15),
    ],
)
def test_no_interval_without_two_pairs(tmp_path, alone, other, expected):
    assert compare(tmp_path, alone, other) == (pytest.approx(expected), None)


def test_no_metric(tmp_path):
    assert compare(tmp_path, (0.2,), (None,)) is None


def test_nan_metric(tmp_path):
    assert all(map(math.isnan, compare(tmp_path, (0.2, 0.3), (0.4, math.nan))))


def test_no_interval_without_scipy(tmp_path, monkeypatch):
    monkeypatch.setattr(differences, 'stdtrit', None)
    assert compare(tmp_path, (0.2, 0.3), (0.3, 0.5)) == (pytest.approx(0.15), None)


def test_baseline(tmp_path):
    named = [(name, logs.write(tmp_path / name, [logs.train(10)])) for name in ('alone', 'other')]
    assert baseline_of(read_groups(named[:1])) is None and baseline_of(read_groups(named[1:])) is None
