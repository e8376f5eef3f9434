import pytest

from mmdiffkd.visualization.logs import read_log
from tests.test_visualization import logs

START = '20260101_000000'


def read(tmp_path, records, **options):
    return read_log(logs.write(tmp_path / 'run', records, START, **options) / START)


def test_records_by_iteration(tmp_path):
    teacher = {'teacher/coco/bbox_mAP': 0.5, 'step': 0}
    log = read(tmp_path, [teacher, logs.train(10), logs.train(20), logs.val(20, 0.3)])
    assert list(log.train) == [10, 20] and log.train[20]['loss'] == 0.05
    assert log.val == {20: {'coco/bbox_mAP': 0.3}}
    assert log.teacher == {'coco/bbox_mAP': 0.5}


def test_validation_by_epoch_and_versions(tmp_path):
    text = ' Python: 3.11.7 (main)\n PyTorch: 2.12.1\n seed: 3\nEpoch(train)  [1][ 5/30]  lr: 1\n'
    log = read(
        tmp_path, [logs.train(5, epoch=1), logs.val(1, 0.1), logs.train(35, epoch=2), logs.val(2, 0.2)], text=text
    )
    assert {after: metrics['coco/bbox_mAP'] for after, metrics in log.val.items()} == {30: 0.1, 60: 0.2}
    assert log.versions == dict(Python='3.11.7', PyTorch='2.12.1', seed='3')


def test_versions_after_the_config(tmp_path):
    line = '2026/01/01 00:00:00 - mmengine - INFO - Versions: mmdiffkd 0.1.0, mmdet 3.5.1+cu1\n'
    log = read(tmp_path, [logs.train(5)], text=' PyTorch: 2.12.1\n' + 'model = dict()\n' * 5000 + line)
    assert log.versions == dict(PyTorch='2.12.1', mmdiffkd='0.1.0', mmdet='3.5.1+cu1')


def test_incomplete_last_line_is_ignored(tmp_path):
    log = read(tmp_path, [logs.train(10), '{"loss": 0.'])
    assert list(log.train) == [10] and log.unreadable == 0


def test_damaged_lines_are_counted(tmp_path):
    assert read(tmp_path, [logs.train(10), '{"loss": 0.', logs.train(20)]).unreadable == 1


def test_no_readable_record(tmp_path):
    with pytest.raises(ValueError, match='has no readable record'):
        read(tmp_path, ['not a log'])


def test_distillation_keys_of_a_different_version(tmp_path):
    with pytest.raises(ValueError, match='unknown to this version: diffkd.loss_fpn_old'):
        read(tmp_path, [logs.train(10, **{'diffkd.loss_fpn_old': 1.0})])
