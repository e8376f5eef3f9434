"""Pictures of real runs."""

from pathlib import Path

import cv2
import pytest
import torch
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend, MLflowVisBackend
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny


@pytest.fixture
def train(tmp_path, shapes):
    """Run a few iterations and give the run back."""

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
        model = model or tiny.distiller_cfg(tmp_path)
        runner = Runner.from_cfg(tiny.run_cfg(model, shapes, tmp_path / folder, **{**settings, **options}))
        runner.train()
        return runner

    return run


def pictures(folder):
    return sorted(path.name for path in folder.glob('run/*/vis_data/vis_image/*.png'))


def test_pictures_of_every_level_at_the_start_and_every_interval(train, tmp_path):
    train()
    names = {
        f'diffkd.fpn.{level}{kind}_{step}.png' for level in range(4) for kind in ('', '.steps') for step in (1, 2, 4)
    }
    assert {name for name in pictures(tmp_path) if '.4' not in name} == names
    path = next(tmp_path.glob('run/*/vis_data/vis_image/diffkd.fpn.0_4.png'))
    picture = cv2.imread(str(path))
    assert picture.shape[1] > 1000 and picture.std() > 10


def test_the_training_is_the_same_with_and_without(train, tmp_path):
    with_pictures = train().model.state_dict()
    without = train(hooks=(), folder='without').model.state_dict()
    assert all(torch.equal(value, without[key]) for key, value in with_pictures.items())


def test_nothing_is_kept_after_an_iteration(train):
    model = train().model
    assert model.kept is None and not model.keep_outputs


def test_resting_iterations_wait_for_the_next(train, tmp_path):
    schedule = dict(type='mmdiffkd.DistillScheduleHook', begin=2, by_epoch=False)
    train(hooks=[schedule, dict(type='mmdiffkd.DiffKDVisualizationHook', interval=10)])
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'3.png'}


def test_tensorboard_has_pictures_and_scalars_of_every_level(train, tmp_path):
    train(
        iterations=1, visualizer__vis_backends=[dict(type='TensorboardVisBackend')], default_hooks__logger__interval=1
    )
    (folder,) = {path.parent for path in tmp_path.glob('run/*/vis_data/events.*')}
    events = EventAccumulator(str(folder), size_guidance=dict(images=0)).Reload()
    assert {'diffkd.fpn.0', 'diffkd.fpn.0.steps', 'diffkd.fpn.3'} <= set(events.Tags()['images'])
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.kd.3', 'diffkd.fpn.gamma.3'} <= set(events.Tags()['scalars'])
    (picture,) = events.Images('diffkd.fpn.0')
    assert picture.step == 1 and picture.width > 1000


@VISBACKENDS.register_module(force=True)
class MLflowNames(MLflowVisBackend):
    """MLflow's backend without its server: it saves pictures by their names, as MLflow does."""

    __init__ = BaseVisBackend.__init__
    _init_env = add_config = add_scalar = add_scalars = close = lambda self, *args, **kwargs: None

    def add_image(self, name, image, step=0, **kwargs):
        folder = Path(self._save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def test_mlflow_takes_names_for_files(train, tmp_path):
    train(visualizer__vis_backends=[dict(type='MLflowNames')])
    names = {path.name for path in tmp_path.glob('run/*/vis_data/*.png')}
    assert {'diffkd.fpn.0_1.png', 'diffkd.fpn.0_2.png', 'diffkd.fpn.0.steps_4.png'} <= names


def test_a_resumed_run_draws_at_its_intervals(train, tmp_path):
    train(iterations=2, folder='run')
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'1.png', '2.png'}
    train(iterations=4, resume=True)
    assert {name.rsplit('_', 1)[1] for name in pictures(tmp_path)} == {'1.png', '2.png', '4.png'}


def test_without_a_teacher_it_does_nothing(train, tmp_path):
    train(model=dict(type='mmdiffkd.DiffKDDistiller', student=tiny.detector()))
    assert not pictures(tmp_path)


def test_a_model_that_is_no_distiller(train):
    with pytest.raises(
        TypeError, match='DiffKDVisualizationHook needs a DiffKDDistiller, but the model is a RetinaNet'
    ):
        train(model=tiny.detector())


def test_interval_below_one(train):
    with pytest.raises(ValueError, match='interval=0'):
        train(hooks=[dict(type='mmdiffkd.DiffKDVisualizationHook', interval=0)])
