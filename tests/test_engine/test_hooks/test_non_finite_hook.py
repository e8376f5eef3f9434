import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests import tiny
from tests.same import assert_same

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)


@pytest.fixture
def runner(tmp_path, shapes):
    """Build a run of a few iterations."""

    def build(model_cfg=None, iterations=3, optim_wrapper=None, **hook):
        return Runner.from_cfg(
            tiny.run_cfg(
                model_cfg or tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT),
                shapes,
                tmp_path / 'run',
                train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations, val_begin=99),
                param_scheduler=[],
                default_hooks__logger__interval=1,
                optim_wrapper={'_delete_': True, 'type': 'OptimWrapper', 'optimizer': SGD, **(optim_wrapper or {})},
                custom_hooks=[dict(type='mmdiffkd.NonFiniteHook', **hook)],
            )
        )

    return build


def state(model):
    return copy.deepcopy(dict(model.state_dict()))


class _BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float('nan')


def break_loss(outputs):
    outputs[0].losses['loss_kd'] = outputs[0].losses['loss_kd'] * float('inf')


def break_gradient(outputs):
    """Make the gradient of the second level NaN; the loss stays finite."""
    outputs[1].losses['loss_kd'] = _BrokenGradient.apply(outputs[1].losses['loss_kd'])


def break_iterations(model, iterations, damage):
    """Apply ``damage`` to the outputs of the neck in some iterations; return the state before every iteration."""
    states = []

    def damage_hook(module, inputs, outputs):
        if len(states) - 1 in iterations:
            damage(outputs)
        return outputs

    # the backbone is the first module to run in an iteration
    model.backbone.register_forward_pre_hook(lambda module, inputs: states.append(state(model)))
    model.diffkd['fpn'].register_forward_hook(damage_hook)
    return states


def read_log(tmp_path):
    return next((tmp_path / 'run').glob('*/*.log')).read_text()


@pytest.mark.parametrize(
    'damage, cause',
    [(break_loss, 'diffkd.fpn.loss_kd (level 0) (1'), (break_gradient, 'diffkd.fpn, level 1 (1')],
)
def test_step_is_skipped(runner, tmp_path, damage, cause):
    run = runner(policy='skip')
    states = break_iterations(run.model, [1], damage)
    run.train()
    # momentum and weight decay change nothing, and the running statistics are restored
    assert_same(states[1], states[2])
    assert not torch.equal(states[0]['bbox_head.retina_cls.weight'], states[1]['bbox_head.retina_cls.weight'])
    assert not torch.equal(states[2]['bbox_head.retina_cls.weight'], state(run.model)['bbox_head.retina_cls.weight'])
    log = read_log(tmp_path)
    assert f'Iteration 1 was skipped because of non-finite values in {cause} skipped so far).' in log
    assert 'diffkd.skipped: 1' in log


def test_clipping_does_not_hide_the_level(runner):
    run = runner(optim_wrapper=dict(clip_grad=dict(max_norm=1)))
    break_iterations(run.model, [1], break_gradient)
    with pytest.raises(FloatingPointError, match='gradient is not finite in iteration 1: diffkd.fpn, level 1'):
        run.train()


def test_error_names_the_parameter(runner):
    run = runner()
    run.model.bbox_head.retina_reg.bias.register_hook(lambda gradient: gradient * float('inf'))
    with pytest.raises(FloatingPointError, match='not finite in iteration 0: bbox_head.retina_reg.bias'):
        run.train()


def test_non_finite_loss_stops_the_run_without_the_hook(runner):
    run = runner()
    run._hooks = [hook for hook in run.hooks if type(hook).__name__ != 'NonFiniteHook']
    break_iterations(run.model, [1], break_loss)
    with pytest.raises(FloatingPointError, match=r'not finite in iteration 1: diffkd\.fpn\.loss_kd \(level 0\)'):
        run.train()


def test_too_many_consecutive_skips(runner, tmp_path):
    run = runner(iterations=7, policy='skip', max_consecutive_skips=2)
    break_iterations(run.model, [0, 1, 3, 4, 5], break_loss)
    with pytest.raises(FloatingPointError, match='3 steps in a row had non-finite values, the last .* iteration 5'):
        run.train()
    assert '(5 skipped so far)' in read_log(tmp_path)


def test_accumulated_step_is_skipped_as_a_whole(runner):
    """A step has two iterations; the first iteration of the second step is not finite."""
    run = runner(iterations=6, optim_wrapper=dict(accumulative_counts=2), policy='skip')
    states = break_iterations(run.model, [2], break_loss)
    run.train()
    weight = 'bbox_head.retina_cls.weight'
    same = [
        torch.equal(before[weight], after[weight]) for before, after in zip(states, [*states[1:], state(run.model)])
    ]
    assert same == [True, False, True, True, True, False]


def test_limit_counts_steps_not_iterations(runner, tmp_path):
    """The first of the two iterations of every step is not finite."""
    run = runner(iterations=8, optim_wrapper=dict(accumulative_counts=2), policy='skip', max_consecutive_skips=2)
    break_iterations(run.model, [0, 2, 4, 6], break_loss)
    with pytest.raises(FloatingPointError, match='3 steps in a row .* iteration 5: .*level 0. of iteration 4'):
        run.train()


def test_large_gradients_are_not_skipped(runner, tmp_path):
    """The gradients are finite, although the sum of their squares overflows."""
    run = runner(iterations=1)
    run.model.bbox_head.retina_reg.bias.register_hook(lambda gradient: gradient * 0 + 1e25)
    run.train()
    assert run.model.bbox_head.retina_reg.bias.abs().max() > 1e22


def test_overflow_is_left_to_the_loss_scaler(runner):
    """The scaler calls fused optimizers even after an overflow."""
    run = runner(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01, fused=True)))
    run.optim_wrapper = run.build_optim_wrapper(run.optim_wrapper)
    run.register_hook(Overflow())
    run.train()
    assert run.message_hub.get_info('diffkd.skipped', 0) == 0


class Overflow(Hook):
    """Tell a fused optimizer about an overflow in the second iteration, as GradScaler does."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        optimizer = runner.optim_wrapper.optimizer
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        if runner.iter == 1:
            optimizer.found_inf = torch.ones(())
            bias = runner.model.bbox_head.retina_reg.bias
            self.handle = bias.register_hook(lambda gradient: gradient * float('inf'))

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter == 1:
            self.handle.remove()


def test_needs_a_distiller(runner):
    with pytest.raises(ValueError, match='needs a DiffKDDistiller, but the model is a RetinaNet'):
        runner(tiny.detector()).train()


def test_unknown_policy(runner):
    with pytest.raises(ValueError, match="NonFiniteHook: policy='ignore' must be 'raise' or 'skip'"):
        runner(policy='ignore').train()
