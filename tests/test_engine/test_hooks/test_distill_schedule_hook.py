import copy
import json
import math

import pytest
import torch
from mmengine.runner import Runner

from tests import tiny

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)


@pytest.fixture
def runner(tmp_path, shapes):
    """Build a run of eight iterations; with ``epochs``, two epochs of four iterations."""

    def build(epochs=False, model_cfg=None, **hook):
        loop = (
            dict(type='EpochBasedTrainLoop', max_epochs=2, val_begin=9)
            if epochs
            else dict(type='IterBasedTrainLoop', max_iters=8, val_begin=99)
        )
        return Runner.from_cfg(
            tiny.run_cfg(
                model_cfg or tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT),
                shapes,
                tmp_path / 'run',
                train_cfg=dict(_delete_=True, **loop),
                param_scheduler=[],
                default_hooks__logger__interval=1,
                optim_wrapper=dict(_delete_=True, type='OptimWrapper', optimizer=SGD),
                custom_hooks=[dict(type='mmdiffkd.DistillScheduleHook', **{'by_epoch': epochs, **hook})],
            )
        )

    return build


def records(tmp_path):
    file = next((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in file.read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize(
    'epochs, hook',
    [(False, dict(begin=1, end=7, warmup=2, decay=2)), (True, dict(begin=0, end=1, warmup=0.5, decay=0.5))],
)
def test_weight_of_every_iteration(runner, tmp_path, epochs, hook):
    expected = [0.5, 1, 1, 0.5, 0, 0, 0, 0] if epochs else [0, 0.5, 1, 1, 1, 1, 0.5, 0]
    runner(epochs, **hook).train()
    log = records(tmp_path)
    assert [record['diffkd.weight'] for record in log] == expected
    # idle iterations do not log values of earlier iterations
    assert [record.get('diffkd.fpn.loss_diffusion', 0) > 0 for record in log] == [weight > 0 for weight in expected]
    assert [any(key.startswith('diffkd.fpn') for key in record) for record in log] == [
        weight > 0 for weight in expected
    ]


def test_cosine_decay(runner, tmp_path):
    runner(end=6, decay=4, decay_curve='cosine').train()
    linear = [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    expected = [(1 - math.cos(math.pi * weight)) / 2 for weight in linear]
    assert [record['diffkd.weight'] for record in records(tmp_path)] == pytest.approx(expected)


def test_weight_scales_only_the_distance(tmp_path):
    losses = []
    for weight in (1.0, 0.25):
        model = tiny.build(tiny.distiller_cfg(tmp_path))
        model.distill_state.weight = weight
        inputs = tiny.batch(model)
        torch.manual_seed(1)
        losses.append(model.loss(*inputs))
    one, quarter = losses
    torch.testing.assert_close(quarter['diffkd.fpn.loss_kd'], 0.25 * one['diffkd.fpn.loss_kd'])
    torch.testing.assert_close(quarter['diffkd.fpn.kd.2'], 0.25 * one['diffkd.fpn.kd.2'])
    torch.testing.assert_close(quarter['diffkd.fpn.loss_diffusion'], one['diffkd.fpn.loss_diffusion'])


def test_idle_iterations_skip_teacher_and_diffusion_module(runner):
    run = runner(end=3)
    calls, neck_states = [], []
    teacher, neck = run.model.diffkd_teacher.model, run.model.diffkd['fpn']
    teacher.backbone.register_forward_hook(lambda *args: calls.append(run.iter))
    neck.register_forward_hook(lambda *args: neck_states.append(copy.deepcopy(neck.state_dict())))
    weights = []
    run.model.bbox_head.register_forward_pre_hook(lambda *args: weights.append(copy.deepcopy(neck.state_dict())))
    run.train()
    # three calls for the first batch, on which the optimized teacher is compared with the original
    assert calls == [0, 0, 0, 1, 2] and len(neck_states) == 3
    after_last_step, end = weights[3], neck.state_dict()
    for key, value in end.items():
        assert torch.equal(after_last_step[key], value), key  # momentum and weight decay change no weights
    assert any(not torch.equal(weights[0][key], end[key]) for key in end)


def test_every_third_iteration(runner, tmp_path):
    run = runner(begin=1, interval=3)
    calls, weights = [], []
    run.model.diffkd['fpn'].register_forward_hook(lambda *args: calls.append(run.iter))
    run.model.bbox_head.register_forward_pre_hook(
        lambda *args: weights.append(copy.deepcopy(run.model.diffkd['fpn'].state_dict()))
    )
    run.train()
    assert calls == [1, 4, 7]
    moved = [any((a[key] != b[key]).any() for key in a) for a, b in zip(weights, weights[1:])]
    # momentum does not move the weights in idle iterations
    assert moved == [False, True, False, False, True, False, False]
    log = records(tmp_path)
    assert [record['diffkd.weight'] for record in log] == [0, 1, 0, 0, 1, 0, 0, 1]
    assert all(record['diffkd.fpn.loss_kd'] > 0 for record in log[1:])


def test_interval_with_accumulated_gradients(runner):
    """The diffusion module is updated in every optimizer step, also if the last iteration of the step is idle."""
    run = runner(interval=2)
    run.optim_wrapper = run.build_optim_wrapper(dict(type='OptimWrapper', optimizer=SGD, accumulative_counts=2))
    weights = []
    weight = run.model.diffkd['fpn'].levels[0].align.weight
    run.model.bbox_head.register_forward_pre_hook(lambda *args: weights.append(weight.clone()))
    run.train()
    moved = [bool((a != b).any()) for a, b in zip(weights, weights[1:])]
    assert moved == [False, True, False, True, False, True, False]


@pytest.mark.slow
def test_runner_can_train_twice(runner):
    run = runner(warmup=2)
    for length in (8, 16):
        run.train_loop._max_iters = length
        before = {name: p.clone() for name, p in run.model.diffkd.named_parameters()}
        run.train()
        moved = [name for name, p in run.model.diffkd.named_parameters() if not torch.equal(p, before[name])]
        assert len(moved) > 0.9 * len(before) and run.iter == length


@pytest.mark.parametrize(
    'hook, message',
    [
        (dict(begin=5, end=5), 'end=.* is too early'),
        (dict(interval=0), 'DistillScheduleHook: interval=0 must be an integer of at least 1'),
        (dict(decay_curve='cos'), "decay_curve='cos' must be 'linear' or 'cosine'"),
        (dict(warmup=-1), 'warmup=-1 must be a finite number of at least 0'),
        (dict(begin=2, end=4, warmup=2, decay=1), 'end=.* is too early'),
        (dict(end=9), 'do not fit into the 8 iterations'),
        (dict(by_epoch=True), 'counts epochs, but the IterBasedTrainLoop has no epochs'),
    ],
)
def test_invalid_settings(runner, hook, message):
    with pytest.raises(ValueError, match=message):
        runner(**hook).train()


def test_no_op_without_a_teacher(runner, tmp_path):
    run = runner(model_cfg=dict(tiny.distiller_cfg(tmp_path), teacher=None), end=3)
    run.train()
    assert run.iter == 8


def test_needs_a_distiller(runner):
    with pytest.raises(ValueError, match='DistillScheduleHook needs a DiffKDDistiller, but the model is a RetinaNet'):
        runner(model_cfg=tiny.detector()).train()


def test_methods_that_train_only_the_student(runner, tmp_path):
    """Attention transfer has no adapter, so the diffusion module has no parameters."""
    runner(model_cfg=tiny.distiller_cfg(tmp_path, preset='at'), warmup=4).train()
    assert [record['diffkd.weight'] for record in records(tmp_path)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
