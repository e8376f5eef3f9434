"""Distill with mixed precision, gradient accumulation and gradient clipping."""

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner, autocast

from mmdiffkd.models.distillers.teacher import Teacher
from tests import tiny


class CPUAmpOptimWrapper(OptimWrapper):
    """Runs the forward pass under autocast on the CPU, which ``AmpOptimWrapper`` does not support."""

    def optim_context(self, model):
        return autocast(device_type='cpu', dtype=torch.bfloat16)


@pytest.fixture
def runner(tmp_path, shapes):
    """Build a run of four iterations."""
    OPTIM_WRAPPERS.register_module(module=CPUAmpOptimWrapper, force=True)

    def build(**optim_wrapper):
        sgd = dict(type='SGD', lr=0.01, momentum=0.9)
        cfg = tiny.run_cfg(
            tiny.distiller_cfg(tmp_path),
            shapes,
            tmp_path / 'run',
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_begin=99),
            param_scheduler=[],
            optim_wrapper=dict(_delete_=True, optimizer=sgd, **{'type': 'OptimWrapper', **optim_wrapper}),
            custom_hooks=[dict(type='mmdiffkd.NonFiniteHook')],
        )
        return Runner.from_cfg(cfg)

    yield build
    OPTIM_WRAPPERS.module_dict.pop('CPUAmpOptimWrapper')


def train(run):
    """Return the losses of every iteration, and a weight of each module before every iteration and at the end."""
    logs, weights = [], []
    student, diffusion = run.model.bbox_head.retina_cls.weight, run.model.diffkd['fpn'].levels[0].align.weight
    run.model.backbone.register_forward_pre_hook(lambda *_: weights.append((student.clone(), diffusion.clone())))
    parse = run.model.parse_losses
    run.model.parse_losses = lambda losses: (logs.append(losses), parse(losses))[1]
    run.train()
    return logs, [*weights, (student.clone(), diffusion.clone())]


def test_bfloat16_losses_are_close_to_float32(runner):
    logs, _ = train(runner())
    torch.manual_seed(0)
    amp_logs, _ = train(runner(type='CPUAmpOptimWrapper'))
    for log in amp_logs:
        assert {value.dtype for name, value in log.items() if name.startswith('diffkd.')} == {torch.float32}
    for name in ('diffkd.fpn.loss_kd', 'diffkd.fpn.loss_diffusion'):
        torch.testing.assert_close(amp_logs[0][name], logs[0][name], rtol=0.1, atol=0.02)


def test_gradients_scale_with_the_loss(tmp_path):
    """As with ``AmpOptimWrapper(loss_scale=512.)``, but in bfloat16, where small gradients do not underflow."""
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    inputs = tiny.batch(model)
    gradients = []
    for scale in (1.0, 512.0):
        torch.manual_seed(3)
        model.zero_grad()
        with autocast(device_type='cpu', dtype=torch.bfloat16):
            losses = model.loss(*inputs)
        loss, _ = model.parse_losses(losses)
        (loss * scale).backward()
        gradients.append({name: p.grad / scale for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0.05, atol=1e-3, msg=name)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_teacher_in_half_precision(tmp_path, dtype):
    cfg = tiny.distiller_cfg(tmp_path)
    full = tiny.build(cfg)
    half = tiny.build(tiny.ConfigDict(cfg, teacher=dict(cfg.teacher, dtype=dtype)))
    inputs, samples = tiny.batch(full)
    full_features, half_features = (model.diffkd_teacher.features(inputs, samples)['neck'] for model in (full, half))
    for expected, actual in zip(full_features, half_features):
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, expected)
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert all(parameter.dtype == torch.float32 for parameter in half.diffkd_teacher.model.parameters())
    assert half.diffkd_teacher.fingerprint == full.diffkd_teacher.fingerprint


def test_unknown_teacher_dtype():
    with pytest.raises(ValueError, match="dtype='bf16' must be one of 'bfloat16', 'float16' or None"):
        Teacher(tiny.RETINANET, dtype='bf16')


def test_gradient_accumulation(runner):
    _, weights = train(runner(accumulative_counts=2))
    for index, moves in enumerate([False, True, False, True]):
        for before, after in zip(weights[index], weights[index + 1]):
            assert torch.equal(before, after) is not moves


def test_gradient_clipping_includes_the_diffusion_module(runner):
    run = runner(clip_grad=dict(max_norm=1e-3))
    norms = []
    parameters = run.model.parameters

    def record_norm(*_):
        gradients = [p.grad for p in parameters() if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients])).item())

    run.optim_wrapper = run.build_optim_wrapper(run.optim_wrapper)
    run.optim_wrapper.optimizer.register_step_pre_hook(record_norm)
    run.train()
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
