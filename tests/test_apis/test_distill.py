"""Real runs of ``distill``, the function for notebooks."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from mmdiffkd.apis import distill
from tests import tiny
from tests.conftest import logged


@pytest.fixture
def student(tmp_path, shapes):
    """Config of a plain run with two iterations and a validation."""
    cfg = tiny.run_cfg(
        tiny.detector(),
        shapes,
        tmp_path,
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=2),
        param_scheduler=[],
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval=1)),
        randomness=dict(seed=0),
    )
    cfg.pop('experiment_name'), cfg.pop('work_dir')
    return cfg


@pytest.fixture
def teacher(tmp_path):
    cfg = tiny.detector(base_channels=16)
    return Config(dict(model=cfg)), tiny.write_checkpoint(cfg, tmp_path / 'teacher.pth')


def test_trains_and_exports(student, teacher, tmp_path):
    before = student.to_dict()
    result = distill(student, *teacher, work_dir=tmp_path / 'run')
    assert student.to_dict() == before
    losses = [record for record in logged(tmp_path / 'run') if 'diffkd.fpn.loss_kd' in record]
    assert len(losses) == 2
    assert result['metrics'].keys() >= {'coco/bbox_mAP', 'coco/bbox_mAP_50'} and 'time' not in result['metrics']
    weights = torch.load(result['student_checkpoint'], weights_only=True)['state_dict']
    trained = torch.load(result['checkpoint'], weights_only=False)['state_dict']
    assert set(weights) == {key for key in trained if not key.startswith('diffkd.')} != set(trained)
    # a plain runner without this package measures the same metric
    plain = Config.fromfile(result['student_config'])
    assert 'mmdiffkd' not in plain.pretty_text
    plain.work_dir, plain.load_from = str(tmp_path / 'plain'), result['student_checkpoint']
    tested = Runner.from_cfg(plain).test()
    assert tested['coco/bbox_mAP_50'] == pytest.approx(result['metrics']['coco/bbox_mAP_50'])
    assert Config.fromfile(result['config']).model.teacher.checkpoint == teacher[1]


def test_resume(student, teacher, tmp_path):
    distill(student, *teacher, work_dir=tmp_path / 'run')
    more = {'train_cfg.max_iters': 3}
    result = distill(student, *teacher, work_dir=tmp_path / 'run', cfg_options=more, resume=True)
    assert Path(result['checkpoint']).name == 'iter_3.pth'
    assert [record['step'] for record in logged(tmp_path / 'run') if 'loss' in record] == [1, 2, 3]


def test_two_runs_in_one_process_have_separate_logs(student, teacher, tmp_path):
    for name in ('a', 'b'):
        distill(student, *teacher, work_dir=tmp_path / name)
    for name in ('a', 'b'):
        assert [record['step'] for record in logged(tmp_path / name) if 'loss' in record] == [1, 2]


def test_options(student, teacher, tmp_path):
    result = distill(
        student,
        *teacher,
        work_dir=tmp_path / 'run',
        pairs=dict(last=dict(student='backbone', teacher='backbone', levels=[3], neck=dict(latent_channels=8))),
        custom_hooks=[dict(type='mmdiffkd.DiffKDVisualizationHook', interval=2)],
        cfg_options={'train_cfg.max_iters': 1, 'train_cfg.val_begin': 99},
    )
    assert Path(result['checkpoint']).name == 'iter_1.pth' and result['metrics'] == {}
    (record,) = [record for record in logged(tmp_path / 'run') if 'loss' in record]
    assert 'diffkd.last.loss_reconstruction' in record
    assert list((tmp_path / 'run').glob('*/vis_data/vis_image/diffkd.last.3_1.png'))


def test_checkpoints_in_another_folder(student, teacher, tmp_path):
    options = {'default_hooks.checkpoint.out_dir': str(tmp_path / 'elsewhere')}
    result = distill(student, *teacher, work_dir=tmp_path / 'run', cfg_options=options)
    assert Path(result['checkpoint']) == tmp_path / 'elsewhere' / 'run' / 'iter_2.pth'
    assert (tmp_path / 'run' / 'student.pth').is_file()


def test_only_the_main_process_writes_files(student, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module('mmdiffkd.apis.distill'), 'is_main_process', lambda: False)
    result = distill(student, *teacher, work_dir=tmp_path / 'run')
    assert Path(result['checkpoint']).is_file() and result['metrics']
    assert not Path(result['student_checkpoint']).exists() and not Path(result['config']).exists()


def test_invalid_arguments(student, teacher, tmp_path):
    with pytest.raises(ValueError, match="teacher_checkpoint='zoo' needs"):
        distill(student, teacher[0], work_dir=tmp_path / 'run')
    with pytest.raises(FileNotFoundError, match='nearest'):
        distill(student, 'mmdet::retina/x.py', teacher[1], work_dir=tmp_path / 'run')
    nested = Config(dict(student.to_dict(), model=tiny.distiller_cfg(tmp_path)))
    with pytest.raises(ValueError, match='is already a distillation config'):
        distill(nested, *teacher, work_dir=tmp_path / 'run')
    assert MODELS.build(student.model)  # distill did not change the student's config


def test_preset(student, teacher, tmp_path):
    """The channels differ, so the attention maps are compared, but not drawn."""
    distill(
        student,
        *teacher,
        work_dir=tmp_path / 'run',
        preset='at',
        custom_hooks=[dict(type='mmdiffkd.DiffKDVisualizationHook', interval=1)],
        cfg_options={'train_cfg.max_iters': 1, 'train_cfg.val_begin': 99},
    )
    (record,) = [record for record in logged(tmp_path / 'run') if 'loss' in record]
    assert record['diffkd.fpn.loss_kd'] > 0
