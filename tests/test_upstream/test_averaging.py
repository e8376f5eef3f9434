"""EMA and SWA average the student and the diffusion module by upstream's formulas, but not the teacher."""

import math

import pytest
import torch
from mmengine.registry import MODELS

from mmdiffkd.engine.checkpoint import without_diffusion_module
from tests import tiny

MOMENTUM, GAMMA = 0.2, 3
EMA = dict(type='EMAHook', momentum=MOMENTUM)
EXP_MOMENTUM = dict(EMA, ema_type='ExpMomentumEMA', gamma=GAMMA, update_buffers=True)
SWA = dict(type='EMAHook', ema_type='StochasticWeightAverage', begin_iter=2)


def moving(momentum):
    """Return a moving average whose momentum is a function of the step."""

    def average(weights):
        mean = weights[0].clone()
        for step, value in enumerate(weights[1:], 1):
            mean = (1 - momentum(step)) * mean + momentum(step) * value
        return mean

    return average


AVERAGES = dict(
    ema=(EMA, moving(lambda step: MOMENTUM)),
    ema_of_mmpretrain=(dict(EMA, type='mmpretrain.EMAHook'), moving(lambda step: MOMENTUM)),
    exp_momentum=(
        EXP_MOMENTUM,
        moving(lambda step: (1 - MOMENTUM) * math.exp(-(1 + step) / GAMMA) + MOMENTUM),
    ),
    swa=(SWA, lambda weights: torch.stack(weights[1:]).mean(0)),  # averaging begins in the second iteration
)


@pytest.fixture
def distiller_cfg(tmp_path):
    """Config of a distiller. No weight of the teacher equals one of the student, as BatchNorm weights usually do."""
    cfg = tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)
    content = torch.load(cfg.teacher.checkpoint, weights_only=False)
    for value in content['state_dict'].values():
        if value.is_floating_point():
            value.mul_(1.01).add_(torch.rand_like(value), alpha=1e-3)
    torch.save(content, cfg.teacher.checkpoint)
    return cfg


def averaging(run):
    (hook,) = [hook for hook in run.hooks if type(hook).__name__ == 'EMAHook']
    return hook.ema_model


def is_averaged(key, value, hook):
    """Return whether a tensor is averaged instead of copied from the model."""
    is_buffer = 'running_' in key or 'num_batches' in key
    return value.is_floating_point() and (not is_buffer or hook.get('update_buffers', False))


@pytest.mark.parametrize('hook, average', AVERAGES.values(), ids=AVERAGES.keys())
def test_average_excludes_the_teacher(runner, distiller_cfg, tmp_path, hook, average):
    run = runner(distiller_cfg, custom_hooks=[hook])
    run.train()
    model, ema = run.model, averaging(run)
    history = run.record.weights
    assert len(history) == 4

    # averaged values
    expected = {
        key: average([weights[key] for weights in history]) if is_averaged(key, value, hook) else value
        for key, value in history[-1].items()
    }
    floats = [key for key, value in expected.items() if value.is_floating_point()]
    found = ema.module.state_dict()
    assert list(found) == list(expected)
    for key in floats:
        torch.testing.assert_close(found[key], expected[key], msg=lambda text, key=key: f'{key}: {text}')
    assert any(not torch.equal(expected[key], history[-1][key]) for key in floats if key.startswith('backbone.'))
    assert any(not torch.equal(expected[key], history[-1][key]) for key in floats if key.startswith('diffkd.'))

    # the average does not contain the teacher
    assert ema.module.diffkd_teacher is model.diffkd_teacher
    plain = MODELS.build(tiny.detector())
    student = without_diffusion_module(ema.module.state_dict())
    assert list(student) == list(plain.state_dict())
    assert len(ema.state_dict()) == len(model.state_dict()) + 1  # plus the number of updates
    content = torch.load(tmp_path / 'run' / 'iter_4.pth', weights_only=False)
    assert list(content['ema_state_dict']) == list(ema.state_dict())
    teachers = [value for value in model.diffkd_teacher.model.state_dict().values() if value.is_floating_point()]
    own = [*ema.parameters(), *ema.buffers(), *content['ema_state_dict'].values(), *content['state_dict'].values()]
    memory = {value.data_ptr() for value in teachers}
    assert not any(value.data_ptr() in memory for value in own)
    assert not any(torch.equal(value, other) for value in own for other in teachers if value.shape == other.shape)

    # the checkpoint has the average in state_dict, and the weights of the last iteration, to resume, in ema_state_dict
    for key in floats:
        torch.testing.assert_close(content['state_dict'][key], expected[key])
        torch.testing.assert_close(content['ema_state_dict'][f'module.{key}'], history[-1][key])
    assert content['ema_state_dict']['steps'] == (3 if 'begin_iter' in hook else 4)
    plain.load_state_dict(without_diffusion_module(content['state_dict']))


def test_average_continues_after_resume(runner, distiller_cfg, tmp_path):
    first = runner(distiller_cfg, custom_hooks=[EMA])
    first.train()
    second = runner(
        distiller_cfg, max_iters=6, custom_hooks=[EMA], resume=True, load_from=str(tmp_path / 'run' / 'iter_4.pth')
    )
    second.train()
    history = first.record.weights + second.record.weights
    torch.testing.assert_close(second.record.start, history[3])  # the weights are resumed, not the average
    found = averaging(second).module
    average = AVERAGES['ema'][1]
    assert len(history) == 6
    for key, value in found.named_parameters():
        torch.testing.assert_close(value.data, average([weights[key] for weights in history]))


def test_validation_uses_the_average(runner, distiller_cfg):
    run = runner(distiller_cfg, val_interval=4, custom_hooks=[EMA])
    run.train()
    for key, value in averaging(run).module.named_parameters():
        torch.testing.assert_close(run.record.validated[key], value.data)
    torch.testing.assert_close(dict(run.model.state_dict()), run.record.weights[-1])
