import pytest
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests import tiny

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)


class RecordHook(Hook):
    """Record the weights at the start of training, after every iteration and in validation."""

    def __init__(self):
        self.start, self.validated, self.weights = None, None, []

    def before_train(self, runner):
        self.start = copy_of(runner.model.state_dict())

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append(copy_of(runner.model.state_dict()))

    def before_val_iter(self, runner, *args, **kwargs):
        self.validated = copy_of(runner.model.state_dict())


def copy_of(state_dict):
    return {key: value.clone() for key, value in state_dict.items()}


@pytest.fixture
def runner(tmp_path, shapes):
    """Return a function that builds a run of a few iterations on the shapes. ``run.record`` has its weights."""

    def build(model_cfg, name='run', max_iters=4, val_interval=99, **options):
        defaults = dict(
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=val_interval),
            param_scheduler=[],
            optim_wrapper=dict(_delete_=True, type='OptimWrapper', optimizer=SGD),
            default_hooks__checkpoint=dict(interval=max_iters, by_epoch=False),
        )
        run = Runner.from_cfg(tiny.run_cfg(model_cfg, shapes, tmp_path / name, **{**defaults, **options}))
        run.record = RecordHook()
        run.register_hook(run.record)
        return run

    return build
