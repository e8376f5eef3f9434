import math
import re

import cv2
import numpy as np

from mmdiffkd.visualization.report import write_report
from tests.test_visualization import logs

GAMMA = ('diffkd.fpn.gamma', 'diffkd.fpn.gamma.0', 'diffkd.fpn.gamma.1')


def report(tmp_path, *names, out='out'):
    """Write a report on the runs in folders of these names. Return its text."""
    page = write_report([(name, tmp_path / name) for name in names], tmp_path / out, ['report'])
    return page.read_text()


def test_nan_metrics(tmp_path):
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


def test_gamma_is_always_nan(tmp_path):
    logs.write(tmp_path / 'run', [logs.train(10, **dict.fromkeys(GAMMA, math.nan))])
    assert 'fpn: gamma' in report(tmp_path, 'run')


def test_charts_of_an_earlier_report_are_removed(tmp_path):
    logs.write(tmp_path / 'run', [logs.train(10, loss_old=1.0, **{'diffkd.fpn.loss_kd': 1.0})])
    logs.write(tmp_path / 'other', [logs.train(10)])
    report(tmp_path, 'run')
    out = tmp_path / 'out'
    (out / 'photo.png').touch()
    assert {'fpn-loss_kd.png', 'loss.png'} < {path.name for path in out.iterdir()}
    report(tmp_path, 'other')
    assert {path.name for path in out.iterdir()} == {'report.html', 'loss.png', 'photo.png'}


def test_names_with_dollar_signs_are_not_formulas(tmp_path):
    teacher = {'teacher/coco/bbox_mAP': 0.5, 'step': 0}
    for name in ('a', r'b$\q$'):
        teacher['teacher/coco/bbox_mAP'] += 0.1
        logs.write(tmp_path / name, [dict(teacher), logs.train(10), logs.val(10, 0.3), logs.val(20, 0.4)])
    assert r'teacher of b$\q$' in report(tmp_path, 'a', r'b$\q$')


def test_differences_to_the_run_alone(tmp_path):
    for name, value in dict(alone=0.2, DiffKD=0.25).items():
        logs.write(tmp_path / name, [logs.train(10), logs.val(10, value)])
    page = report(tmp_path, 'DiffKD', 'alone')
    assert '<th>vs. alone</th>' in page and '<td>+0.050</td>' in page and '95%' not in page
    assert 'vs. alone' not in report(tmp_path, 'DiffKD') and 'vs. alone' not in report(tmp_path, 'alone')


def test_teacher_that_was_only_tested(tmp_path):
    logs.write(tmp_path / 'alone', [logs.train(10), logs.val(10, 0.2), logs.val(20, 0.3)])
    logs.write_test(tmp_path / 'teacher', {'coco/bbox_mAP': 0.5})
    page = report(tmp_path, 'teacher', 'alone')
    assert 'alone 0.3 at iteration 20; teacher (test) 0.5.' in page and '<td>+0.200</td>' in page
    assert 'No validation was logged by teacher: charts and differences use the test results.' in page


def test_missing_values_are_explained(tmp_path):
    sizes = {'coco/bbox_mAP_l': -1.0, 'step': 10}
    logs.write(tmp_path / 'run', [logs.train(10), {**logs.val(10, 0.2), **sizes}])
    logs.write(tmp_path / 'other', [logs.train(10), logs.val(10, math.nan)])
    page = report(tmp_path, 'run')
    assert '<td>coco/bbox_mAP_l</td><td>–</td>' in page and '-1.0' not in page
    assert 'have no objects for this metric' in page and 'nan:' not in page
    assert 'nan: the run logged' in report(tmp_path, 'other')


def test_only_the_newest_panel_of_a_pair_is_open(tmp_path):
    images = logs.write(tmp_path / 'run', [logs.train(10)]) / '20260101_000000' / 'vis_data' / 'vis_image'
    images.mkdir()
    for pair in ('fpn', 'cls'):
        for name in ('0_1', '0_5', '0_9', '0.steps_9', '1_9'):
            cv2.imwrite(str(images / f'diffkd.{pair}.{name}.png'), np.zeros((4, 8, 3), np.uint8))
    panels = re.findall(r'<details( open)?><summary>(Level .*?)</summary>', report(tmp_path, 'run'))
    of_a_pair = [(' open', 'Level 0, iteration 9'), ('', 'Level 1, iteration 9'), ('', 'Level 0, iteration 1')]
    assert panels == of_a_pair * 2


def test_dark_mode(tmp_path):
    logs.write(tmp_path / 'run', [logs.train(10)])
    page = report(tmp_path, 'run')
    assert '@media (prefers-color-scheme: dark)' in page and 'name="color-scheme" content="light dark"' in page
