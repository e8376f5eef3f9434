"""Pictures of real runs."""

import cv2
import pytest
import torch
from mmengine.runner import Runner

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
