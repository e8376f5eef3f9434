import math
from pathlib import Path

import pytest

from mmdiffkd.visualization.runs import NO_OBJECTS, best_value, last, main_metrics, read_groups, read_run
from tests.test_visualization import logs


def test_later_start_replaces_repeated_iterations(tmp_path):
    folder = logs.write(tmp_path / 'run', [logs.train(10), logs.train(20), logs.train(30), logs.val(30, 0.9)])
    logs.write(folder, [dict(logs.train(20), loss=7.0, loss_cls=7.0), logs.val(20, 0.4)], '20260102_000000')
    run = read_run(folder)
    assert run.own_loss() == {10: 0.1, 20: 7.0}
    assert run.metric('coco/bbox_mAP') == {20: 0.4} and run.iterations == 20
    assert run.starts == ['20260101_000000', '20260102_000000'] and run.seconds == 0.5


def test_own_losses_exclude_distillation(tmp_path):
    kd = {'diffkd.fpn.loss_kd': 5.0, 'diffkd.fpn.gamma': 0.9}
    run = read_run(logs.write(tmp_path / 'run', [logs.train(10, **kd, loss_bbox=0.4)]))
    assert run.own_losses() == ['loss_cls', 'loss_bbox'] and run.own_loss() == {10: pytest.approx(0.5)}


def test_runs_with_the_same_name_are_seeds(tmp_path):
    for index, value in enumerate((0.2, 0.4)):
        logs.write(tmp_path / f'seed{index}', [logs.train(10), logs.val(10, value)])
    (group,) = read_groups([('x', tmp_path / 'seed0'), ('x', tmp_path / 'seed1')])
    mean, deviation = group.spread(lambda run: last(run.metric('coco/bbox_mAP')))
    assert mean == pytest.approx(0.3) and deviation == pytest.approx(0.02**0.5)
    assert main_metrics([group]) == ['coco/bbox_mAP']
    names = [group.name for group in read_groups([(None, tmp_path / 'seed0'), (None, tmp_path / 'seed1')])]
    assert names == ['seed0', 'seed1']


def test_spread_of_nan_metrics(tmp_path):
    for index, value in enumerate((0.2, math.nan)):
        logs.write(tmp_path / f'seed{index}', [logs.train(10), logs.val(10, value)])
    (group,) = read_groups([('x', tmp_path / 'seed0'), ('x', tmp_path / 'seed1')])
    assert all(map(math.isnan, group.spread(lambda run: last(run.metric('coco/bbox_mAP')))))


def test_best():
    assert best_value('coco/bbox_mAP', {1: 0.3, 2: 0.2}) == 0.3 and best_value('val_loss', {1: 0.3, 2: 0.2}) == 0.2
    assert best_value('coco/bbox_mAP', {1: math.nan, 2: 0.2}) == 0.2 and best_value('mIoU', {1: math.nan}) is None


def test_start_without_readable_records_is_left_out(tmp_path):
    folder = logs.write(tmp_path / 'run', [logs.train(10)])
    logs.write(folder, ['{"loss": 0.'], '20260102_000000')
    run = read_run(folder)
    assert list(run.train) == [10] and run.starts == ['20260101_000000']
    assert run.notes == ['run/20260102_000000: left out because its log has no readable record.']


def test_no_start_has_readable_records(tmp_path):
    folder = logs.write(tmp_path / 'run', ['{"loss": 0.'])
    logs.write(folder, [], '20260102_000000')
    with pytest.raises(ValueError, match='has no readable record'):
        read_run(folder)


def test_pictures_of_the_hook(tmp_path):
    folder = logs.write(tmp_path / 'run', [logs.train(10)])
    images = folder / '20260101_000000' / 'vis_data' / 'vis_image'
    images.mkdir()
    for name in ('diffkd.fpn.0_10.png', 'diffkd.fpn.0.steps_10.png', 'val_img_3.png'):
        (images / name).touch()
    found = {(p.pair, p.level, p.steps, p.iteration) for p in read_run(folder).pictures}
    assert found == {('fpn', 0, False, 10), ('fpn', 0, True, 10)}


def test_checkpoint_that_was_only_tested(tmp_path):
    run = read_run(logs.write_test(tmp_path / 'tested', {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_l': NO_OBJECTS}))
    assert run.test == {'coco/bbox_mAP': 0.5} and run.result('coco/bbox_mAP') == 0.5 and not run.iterations
    assert run.starts == ['20260101_000000'] and 'RetinaNet' in run.config and run.versions == {'Python': '3.11.7'}


def test_validations_come_before_tests(tmp_path):
    folder = logs.write(tmp_path / 'run', [logs.train(10), logs.val(10, 0.3)])
    logs.write_test(folder, {'coco/bbox_mAP': 0.5}, '20260102_000000')
    run = read_run(folder)
    assert run.result('coco/bbox_mAP') == 0.3 and run.test == {'coco/bbox_mAP': 0.5} and run.iterations == 10


def test_metrics_without_objects_have_no_value(tmp_path):
    run = read_run(logs.write(tmp_path / 'run', [logs.train(10), logs.val(10, NO_OBJECTS), logs.val(20, 0.2)]))
    assert run.metric('coco/bbox_mAP') == {20: 0.2}


def test_invalid_work_dirs(tmp_path):
    def error(folder, match):
        with pytest.raises((FileNotFoundError, ValueError), match=match):
            read_groups([(None, Path(folder))])

    error(tmp_path / 'gone', 'does not exist')
    error(tmp_path, 'has neither training logs')
    run = logs.write(tmp_path / 'below' / 'run', [logs.train(10)])
    logs.write_test(tmp_path / 'below' / 'tested', {})
    error(tmp_path / 'below', 'contains work dirs; give one or more: run, tested')
    error(run / '20260101_000000', 'is the folder of a single start of a run')
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'x.log.json').touch()
    error(tmp_path / 'old', 'before MMEngine')
    with pytest.raises(ValueError, match='is given twice'):
        read_groups([('a', run), ('b', run)])
