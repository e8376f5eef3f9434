"""Table and conclusion of a comparison."""

import math

from scipy import stats

from mmdiffkd.apis.compare_table import (
    aligned_markdown,
    best_method,
    comparison_rows,
    conclude,
)

METRIC = 'coco/bbox_mAP'
ALONE = {0: 0.20, 1: 0.24, 2: 0.25}
CWD = {0: 0.25, 1: 0.27, 2: 0.31}
PKD = {0: 0.24, 1: 0.28, 2: 0.30}


def plus(values, *gains):
    return {seed: value + gain for (seed, value), gain in zip(values.items(), gains)}


def test_rows():
    val, test = dict(alone=ALONE, cwd=CWD, pkd=PKD), dict(alone=ALONE, cwd=plus(CWD, 0.1, 0.1, 0.1), pkd={0: 0.3})
    costs = dict(alone=dict(time=1.0, memory=100.0), cwd=dict(time=1.5, memory=120.4, gmacs=2.345))
    alone, cwd, pkd, ld = comparison_rows(METRIC, dict(val=val, test=test), costs, dict(pkd='x', ld='failed: NaN'))
    low, high = stats.ttest_rel(list(test['cwd'].values()), list(ALONE.values())).confidence_interval(0.95)
    assert cwd['vs. alone'] == f'+0.147 ({low:+.3f} to {high:+.3f})'
    assert cwd[f'{METRIC} (val)'] == '0.277 ± 0.031' and cwd[f'{METRIC} (test)'] == '0.377 ± 0.031'
    assert (cwd['relative time'], cwd['memory (MiB)'], cwd['added multiply-adds (G)']) == ('1.50', '120', '2.35')
    assert alone['vs. alone'] == alone['vs. best other'] == '–' and alone['added multiply-adds (G)'] == '–'
    # the best other method is chosen on val; a single seed has no interval
    assert pkd['seeds'] == '1' and pkd['vs. alone'] == '+0.100' and pkd['vs. best other'] == '-0.050 cwd'
    assert ld['seeds'] == '0' and ld[f'{METRIC} (test)'] == 'failed: NaN' and ld['vs. alone'] == '–'
    table = aligned_markdown([alone, cwd, pkd, ld])
    assert len({len(line) for line in table.splitlines()}) == 1 and table.count('\n') == 5


def test_percentages_have_two_decimals():
    (row,) = comparison_rows('mIoU', dict(val=dict(alone={0: 30.123, 1: 31.0})), {}, {})
    assert row['mIoU (val)'] == '30.56 ± 0.62'


def test_best_method():
    assert best_method(dict(alone=ALONE, cwd=CWD, pkd=PKD)) == 'cwd'
    assert best_method(dict(alone=ALONE, cwd=CWD, pkd=PKD), without=['cwd']) == 'pkd'
    assert best_method(dict(alone=ALONE, cwd={0: 0.9})) == 'alone'  # another seed failed
    assert best_method(dict(alone={0: 0.1}, cwd={0: math.nan})) == 'alone'
    assert best_method({}) is None


def test_conclusion():
    clear = plus(ALONE, 0.10, 0.11, 0.12)
    values = dict(val=dict(alone=ALONE, cwd=clear, pkd=plus(clear, 0.01, -0.02, 0.0)))
    text = conclude(METRIC, values)
    assert text.startswith(f'On val, cwd is above alone by 0.110 {METRIC} (95% CI 0.085 to 0.135); ')
    assert 'the difference between cwd and pkd is not significant. ' in text
    assert text.endswith('The best method was chosen on val as well, which favors it.')
    values['test'] = dict(alone=clear, cwd=ALONE, pkd=ALONE)
    text = conclude(METRIC, values)
    assert text.startswith('On test, cwd is below alone by 0.110') and 'chosen' not in text
    values['test'] = dict(alone=ALONE, cwd=plus(ALONE, 0.1, -0.1, 0.0), pkd=plus(ALONE, 0.0, 0.1, -0.1))
    assert conclude(METRIC, values) == 'On test, the differences between cwd and alone, pkd are not significant.'


def test_no_claim_without_intervals(monkeypatch):
    text = conclude(METRIC, dict(val=dict(alone={0: 0.1}, cwd={0: 0.5})))
    assert text.startswith('One seed cannot rank methods. cwd has the highest coco/bbox_mAP on val.')
    assert conclude(METRIC, dict(val={})) == 'There are no results yet.'
    assert 'nothing to compare' in conclude(METRIC, dict(val=dict(alone=ALONE)))
    monkeypatch.setattr('mmdiffkd.visualization.differences.stdtrit', None)
    assert 'scipy is not installed' in conclude(METRIC, dict(val=dict(alone=ALONE, cwd=CWD)))
