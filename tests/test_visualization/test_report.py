import math

from mmdiffkd.visualization.report import write_report
from tests.test_visualization import logs

GAMMA = ('diffkd.fpn.gamma', 'diffkd.fpn.gamma.0', 'diffkd.fpn.gamma.1')


def report(tmp_path, *names, out='out'):
    """Write a page on runs in folders of these names."""
    page = write_report([(name, tmp_path / name) for name in names], tmp_path / out, ['report'])
    return page.read_text()


def test_a_metric_that_is_not_a_number(tmp_path):
    for seed in (0, 1):
        absent = {'coco/bbox_mAP': math.nan if seed else 0.3, 'coco/boat_precision': math.nan, 'step': 10}
        logs.write(tmp_path / f'seed{seed}', [logs.train(10), absent])
    named = [('small', tmp_path / f'seed{seed}') for seed in (0, 1)]
    page = write_report([*named, ('other', logs.write(tmp_path / 'other', [logs.train(10), absent]))], tmp_path, ['x'])
    assert 'coco/boat_precision' in page.read_text() and 'nan ± nan' in page.read_text()


def test_skipped_steps_leave_gaps_in_gamma(tmp_path):
    records = [
        logs.train(i, **dict.fromkeys(GAMMA, gamma), **{'diffkd.fpn.loss_kd': gamma})
        for i, gamma in ((10, math.nan), (20, 0.9), (30, 0.8))
    ]
    logs.write(tmp_path / 'run', records)
    assert 'fpn: gamma, mean over levels, by iteration. Last values: run 0.8 at iteration 30' in report(tmp_path, 'run')


def test_gamma_that_never_was_a_number(tmp_path):
    logs.write(tmp_path / 'run', [logs.train(10, **dict.fromkeys(GAMMA, math.nan))])
    assert 'fpn: gamma' in report(tmp_path, 'run')


def test_charts_of_an_earlier_page_go(tmp_path):
    logs.write(tmp_path / 'run', [logs.train(10, loss_old=1.0, **{'diffkd.fpn.loss_kd': 1.0})])
    logs.write(tmp_path / 'other', [logs.train(10)])
    report(tmp_path, 'run')
    out = tmp_path / 'out'
    (out / 'photo.png').touch()
    assert {'fpn-loss_kd.png', 'loss.png'} < {path.name for path in out.iterdir()}
    report(tmp_path, 'other')
    assert {path.name for path in out.iterdir()} == {'report.html', 'loss.png', 'photo.png'}


def test_names_with_dollars_are_no_formulas(tmp_path):
    teacher = {'teacher/coco/bbox_mAP': 0.5, 'step': 0}
    for name in ('a', r'b$\q$'):
        teacher['teacher/coco/bbox_mAP'] += 0.1
        logs.write(tmp_path / name, [dict(teacher), logs.train(10), logs.val(10, 0.3), logs.val(20, 0.4)])
    assert r'teacher of b$\q$' in report(tmp_path, 'a', r'b$\q$')
