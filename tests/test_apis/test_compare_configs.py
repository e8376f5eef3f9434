import sys

import pytest
from mmengine.config import Config

from mmdiffkd.apis.build import build_distiller
from mmdiffkd.apis.compare_configs import (
    check_same,
    config_text,
    has_test_split,
    make_method_config,
    scale_schedule,
)
from mmdiffkd.utils import resolve_config
from tests import tiny

CHECKPOINT = dict(checkpoint=dict(type='CheckpointHook', interval=1))


def scaled(factor, **settings):
    return scale_schedule(Config(dict(default_hooks=CHECKPOINT, **settings)), factor)


def test_epochs():
    cfg = scaled(
        0.5,
        train_cfg=dict(max_epochs=12, val_interval=1, val_begin=4, dynamic_intervals=[(10, 2)]),
        param_scheduler=[
            dict(type='LinearLR', by_epoch=False, begin=0, end=500),
            dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11]),
            dict(type='CosineAnnealingLR', begin=6, end=1e9, T_max=6),
        ],
        custom_hooks=[
            dict(type='PipelineSwitchHook', switch_epoch=10, switch_pipeline=[]),
            dict(type='mmdiffkd.DistillScheduleHook', begin=2, end=None, warmup=1.0, interval=4),
            dict(type='OtherHook', begin=2),
        ],
    )
    assert cfg.train_cfg == dict(max_epochs=6, val_interval=1, val_begin=2, dynamic_intervals=[(5, 1)])
    linear, steps, cosine = cfg.param_scheduler
    assert (linear.begin, linear.end) == (0, 250) and (steps.end, steps.milestones) == (6, [4, 6])
    assert (cosine.begin, cosine.end, cosine.T_max) == (3, 1e9, 3)
    switch, schedule, other = cfg.custom_hooks
    assert switch.switch_epoch == 5 and other.begin == 2
    assert (schedule.begin, schedule.end, schedule.warmup, schedule.interval) == (1, None, 0.5, 4)


def test_shortest_schedule():
    """Lengths stay at least 1, and a scheduler ends after its begin."""
    schedulers = dict(  # of two optimizers
        generator=[dict(type='PolyLR', begin=1, end=2)],
        discriminator=dict(type='StepLR', step_size=3),
    )
    cfg = scaled(0.01, train_cfg=dict(max_iters=90, val_interval=30), param_scheduler=schedulers)
    assert cfg.train_cfg == dict(max_iters=1, val_interval=1)
    (poly,) = cfg.param_scheduler.generator
    assert (poly.begin, poly.end) == (1, 2) and cfg.param_scheduler.discriminator.step_size == 1


def test_longer_schedule_and_the_same():
    settings = dict(train_cfg=dict(max_epochs=12), param_scheduler=dict(type='StepLR', step_size=3))
    assert scaled(3, **settings).train_cfg.max_epochs == 36
    assert scaled(1, **settings).to_dict() == dict(settings, default_hooks=CHECKPOINT)


def test_negative_intervals_mean_never():
    never = dict(checkpoint=dict(type='CheckpointHook', interval=-1))
    cfg = scale_schedule(Config(dict(default_hooks=never, train_cfg=dict(max_epochs=12))), 0.5)
    assert cfg.default_hooks.checkpoint.interval == -1


@pytest.mark.parametrize(
    'name, length',
    [
        ('mmdet::retinanet/retinanet_r50_fpn_2x_coco.py', ('max_epochs', 2)),
        ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', ('max_epochs', 30)),
        ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', ('max_epochs', 30)),
        ('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', ('max_iters', 8000)),
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', ('max_epochs', 10)),
    ],
)
def test_configs_of_the_packages(name, length):
    """A tenth of the schedule; checkpoints and logs have the format that results are read from."""
    cfg = scale_schedule(make_method_config(Config(resolve_config(name).to_dict()), None, '', ''), 0.1)
    key, value = length
    assert cfg.train_cfg[key] == value and not has_test_split(cfg)
    assert cfg.default_hooks.checkpoint.by_epoch == cfg.default_hooks.logger.log_metric_by_epoch == (key != 'max_iters')
    schedulers = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    assert all(s.get('end', 0) <= value for s in schedulers if s.get('by_epoch', True) or key == 'max_iters')
    assert Config.fromstring(Config(cfg.to_dict(), format_python_code=False).pretty_text, '.py').model == cfg.model


def test_results_are_logged_for_any_visualizer():
    student = Config(dict(model=dict(type='A'), train_cfg=dict(max_epochs=1), visualizer=dict(vis_backends=[])))
    cfg = make_method_config(student, None, '', '')
    assert cfg.visualizer.vis_backends == [dict(type='LocalVisBackend')]


@pytest.fixture
def make(tmp_path, shapes):
    """Return a function that makes the config of a method."""
    teacher = tiny.detector(base_channels=16)
    weights = tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth')
    student = tiny.run_cfg(tiny.detector(), shapes, tmp_path)
    return lambda **settings: make_method_config(student, settings, Config(dict(model=teacher)), weights)


def test_loss_weight(make):
    """Only the weight changes: the other pairs and settings of the preset stay."""
    assert make(preset='cwd', loss_weight=2.0).model.distill == dict(fpn=dict(neck=dict(loss_kd=dict(loss_weight=2.0))))
    (level, *_) = build_distiller(make(preset='cwd', loss_weight=2.0))[1].diffkd['fpn'].levels
    assert type(level.loss_kd).__name__ == 'ChannelWiseDivergence' and level.loss_kd.loss_weight == 2.0
    model = build_distiller(make(preset='plus', loss_weight=dict(cls=0.5)))[1]
    assert list(model.pairs) == ['fpn', 'cls', 'reg'] and model.diffkd['cls'].levels[0].loss_kd.loss_weight == 0.5
    distill = dict(fpn=dict(levels=[0], neck=dict(align=False)))
    assert make(preset='fitnet', distill=distill, loss_weight=3).model.distill == dict(
        fpn=dict(levels=[0], neck=dict(align=False, loss_kd=dict(loss_weight=3)))
    )
    assert make(preset='fbkd', loss_weight=2.0).model.distill == dict(fpn=dict(neck=dict(loss_weight=2.0)))
    with pytest.raises(
        ValueError, match=r'is for a method with one pair, but there are fpn, cls, reg; write .*dict\(fpn=0.5\)'
    ):
        make(preset='plus', loss_weight=0.5)
    with pytest.raises(ValueError, match="no pair 'fnp'; the nearest are 'fpn'"):
        make(preset='plus', loss_weight=dict(fnp=0.5))


def test_custom_imports(make, tmp_path, monkeypatch):
    """The modules are imported here and in the processes of the runs."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'my_module_of_an_arm.py').write_text('')
    cfg = make(preset='cwd', custom_imports=dict(imports=['my_module_of_an_arm']))
    assert cfg.custom_imports.imports == ['my_module_of_an_arm', 'mmdiffkd'] and 'my_module_of_an_arm' in sys.modules
    # two arms files can share an arm in the same folder, and import different modules for others
    (tmp_path / 'before.py').write_text(config_text(make(preset='cwd')))
    check_same(tmp_path / 'before.py', cfg)
