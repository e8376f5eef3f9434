"""Check the pictures that are drawn during real runs."""

import re
import sys
from unittest.mock import MagicMock

import cv2
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mmdiffkd.models import DiffusionOutput, DistillNeck, DistillOutput
from tests import tiny


@pytest.fixture
def train(tmp_path, shapes):
    """Run a few iterations and return the runner."""

    def run(
        iterations=4,
        model=None,
        folder='run',
        hooks=(dict(type='mmdiffkd.DiffKDVisualizationHook', interval=2),),
        **options,
    ):
        settings = dict(
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_begin=99),
            param_scheduler=[],
            default_hooks__checkpoint=dict(by_epoch=False, interval=2),
            custom_hooks=list(hooks),
            randomness=dict(seed=0),
        )
        model = model or tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)
        runner = Runner.from_cfg(tiny.run_cfg(model, shapes, tmp_path / folder, **{**settings, **options}))
        runner.train()
        return runner

    return run


def pictures(folder):
    return sorted(path.name for path in folder.glob('run/*/vis_data/vis_image/*.png'))


def test_pictures_of_every_level_at_the_start_and_every_interval(train, tmp_path):
    train(model=tiny.distiller_cfg(tmp_path))
    names = {
        f'diffkd.fpn.{level}{kind}_{step}.png' for level in range(4) for kind in ('', '.steps') for step in (1, 2, 4)
    }
    assert {name for name in pictures(tmp_path) if '.4' not in name} == names
    path = next(tmp_path.glob('run/*/vis_data/vis_image/diffkd.fpn.0_4.png'))
    picture = cv2.imread(str(path))
    assert picture.shape[1] > 1000 and picture.std() > 10


@pytest.mark.slow
def test_training_does_not_change(train, tmp_path):
    with_pictures = train().model.state_dict()
    without = train(hooks=(), folder='without').model.state_dict()
    assert all(torch.equal(value, without[key]) for key, value in with_pictures.items())


def test_no_record_is_kept_after_an_iteration(train):
    model = train().model
    assert model.distill_state.last_record is None and not model.distill_state.capture


def test_idle_iterations_are_replaced_by_the_next(train, tmp_path):
    schedule = dict(type='mmdiffkd.DistillScheduleHook', begin=2, by_epoch=False)
    train(hooks=[schedule, dict(type='mmdiffkd.DiffKDVisualizationHook', interval=10)])
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'3.png'}


def test_tensorboard_has_pictures_and_scalars_of_every_level(train, tmp_path):
    train(
        iterations=1, visualizer__vis_backends=[dict(type='TensorboardVisBackend')], default_hooks__logger__interval=1
    )
    (folder,) = {path.parent for path in tmp_path.glob('run/*/vis_data/events.*')}
    events = EventAccumulator(str(folder), size_guidance=dict(images=0)).Reload()
    assert {'diffkd.fpn.0', 'diffkd.fpn.0.steps', 'diffkd.fpn.1'} <= set(events.Tags()['images'])
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.kd.1', 'diffkd.fpn.gamma.1'} <= set(events.Tags()['scalars'])
    (picture,) = events.Images('diffkd.fpn.0')
    assert picture.step == 1 and picture.width > 1000


def test_wandb_has_pictures_and_scalars_of_every_level(train, monkeypatch):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    by_iteration = dict(name='*', step_metric='iter')
    train(
        iterations=1,
        visualizer__vis_backends=[dict(type='WandbVisBackend', define_metric_cfg=[by_iteration])],
        default_hooks__logger__interval=1,
    )
    wandb.define_metric.assert_called_once_with(**by_iteration)
    logged = {name: value for call in wandb.log.call_args_list for name, value in call.args[0].items()}
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.kd.1', 'diffkd.fpn.gamma.1'} <= set(logged) and logged['iter'] == 1
    pictures = {name for name, value in logged.items() if value is wandb.Image.return_value}
    assert {'diffkd.fpn.0', 'diffkd.fpn.0.steps', 'diffkd.fpn.1'} <= pictures
    assert wandb.Image.call_args_list[0].args[0].shape[1] > 1000


@pytest.mark.slow
def test_mlflow_accepts_the_names_of_pictures_and_scalars(train, tmp_path, monkeypatch):
    mlflow = MagicMock(MlflowException=ValueError)
    mlflow.log_image.side_effect = lambda picture, name: Image.fromarray(picture).save(tmp_path / name)
    monkeypatch.setitem(sys.modules, 'mlflow', mlflow)
    train(visualizer__vis_backends=[dict(type='MLflowVisBackend')], default_hooks__logger__interval=1)
    files = {path.name for path in tmp_path.glob('*.png')}
    assert {'diffkd.fpn.0_1.png', 'diffkd.fpn.0_2.png', 'diffkd.fpn.0.steps_4.png'} <= files
    scalars = {name for call in mlflow.log_metrics.call_args_list for name in call.args[0]}
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.gamma.1'} <= scalars
    assert all(re.fullmatch(r'[/\w.\- :]+', name) for name in scalars)  # the characters that MLflow allows


@HOOKS.register_module()
class NaNImage(Hook):
    """Replace an image of the second iteration by NaN."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1:
            data_batch['inputs'][0] = torch.full_like(data_batch['inputs'][0], float('nan'), dtype=torch.float32)


def test_non_finite_iterations_are_replaced_by_the_next(train, tmp_path):
    skipping = dict(type='mmdiffkd.NonFiniteHook', policy='skip')
    drawing = dict(type='mmdiffkd.DiffKDVisualizationHook', interval=2)
    runner = train(hooks=[skipping, drawing, dict(type='NaNImage')])
    assert runner.iter == 4 and runner.message_hub.get_info('diffkd.skipped') == 1
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'1.png', '3.png', '4.png'}


@MODELS.register_module()
class PlainNeck(DistillNeck):
    """A custom neck without diffusion that returns its features if ``has_features``."""

    def __init__(self, student_channels, teacher_channels, has_features=False):
        super().__init__()
        self.has_features = has_features
        self.convs = nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in zip(student_channels, teacher_channels))

    def forward(self, student, teacher, context):
        outputs = []
        for conv, ours, theirs in zip(self.convs, student, teacher):
            aligned = conv(ours)
            losses = dict(loss_own=nn.functional.mse_loss(aligned, theirs))
            features = DiffusionOutput(losses, None, aligned, theirs, aligned)
            outputs.append(features if self.has_features else DistillOutput(losses))
        return outputs


@pytest.mark.parametrize('has_features', [True, False])
def test_custom_necks_are_drawn_if_they_return_features(train, tmp_path, has_features):
    own = dict(tiny.FPN, neck=dict(type='PlainNeck', has_features=has_features))
    train(iterations=1, model=tiny.distiller_cfg(tmp_path, distill=dict(fpn=tiny.FPN, own=own)))
    names = {name for name in pictures(tmp_path) if name.split('.')[1] == 'own'}
    assert names == ({f'diffkd.own.{level}_1.png' for level in range(5)} if has_features else set())


@pytest.mark.slow
def test_resumed_run_keeps_the_interval(train, tmp_path):
    train(iterations=2, folder='run')
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'1.png', '2.png'}
    train(iterations=4, resume=True)
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'1.png', '2.png', '4.png'}


def test_no_op_without_a_teacher(train, tmp_path):
    train(model=dict(type='mmdiffkd.DiffKDDistiller', student=tiny.detector()))
    assert not pictures(tmp_path)


def test_needs_a_distiller(train):
    with pytest.raises(
        ValueError, match='DiffKDVisualizationHook needs a DiffKDDistiller, but the model is a RetinaNet'
    ):
        train(model=tiny.detector())


def test_interval_below_one(train):
    with pytest.raises(ValueError, match='interval=0'):
        train(hooks=[dict(type='mmdiffkd.DiffKDVisualizationHook', interval=0)])
