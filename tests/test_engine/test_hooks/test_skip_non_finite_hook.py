import copy

import pytest
import torch
from mmengine.runner import Runner

from tests import tiny

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)


@pytest.fixture
def runner(tmp_path, shapes):
    """Build a run of three iterations."""

    def build(model_cfg, **options):
        options = dict(
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3, val_interval=99),
            param_scheduler=[],
            optim_wrapper=dict(_delete_=True, type='OptimWrapper', optimizer=SGD),
            custom_hooks=[dict(type='mmdiffkd.SkipNonFiniteHook')],
            **options,
        )
        return Runner.from_cfg(tiny.run_cfg(model_cfg, shapes, tmp_path / 'run', **options))

    return build


def weights(model):
    return copy.deepcopy([p for _, p in sorted(model.named_parameters())])


def spoil(model, iteration):
    """Make the distillation of one iteration infinite."""
    neck, calls = model.diffkd['fpn'], []

    def damage(module, inputs, outputs):
        calls.append(weights(model))
        if len(calls) - 1 == iteration:
            outputs[0].losses['loss_kd'] = outputs[0].losses['loss_kd'] * float('inf')
        return outputs

    neck.register_forward_hook(damage)
    return calls


def test_the_step_is_left_out(runner, tmp_path):
    run = runner(tiny.distiller_cfg(tmp_path))
    before_each = spoil(run.model, 1)
    run.train()
    first, second, third = before_each
    torch.testing.assert_close(second, third, rtol=0, atol=0)  # neither momentum nor weight decay moved anything
    assert any(not torch.equal(a, b) for a, b in zip(first, second))
    assert any(not torch.equal(a, b) for a, b in zip(third, weights(run.model)))
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert 'Iteration 1 was skipped: not finite were diffkd.fpn.loss_kd' in log


def test_without_the_hook_the_run_stops(runner, tmp_path):
    run = runner(tiny.distiller_cfg(tmp_path))
    run._hooks = [hook for hook in run.hooks if type(hook).__name__ != 'SkipNonFiniteHook']
    spoil(run.model, 1)
    with pytest.raises(FloatingPointError, match=r'not finite in iteration 1: diffkd\.fpn\.loss_kd'):
        run.train()


def test_needs_a_distiller(runner):
    run = runner(tiny.detector())
    with pytest.raises(TypeError, match='needs a DiffKDDistiller, but the model is a RetinaNet'):
        run.train()
