"""Taps inside and outside checkpointed modules have the correct gradient or raise an error."""

import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint

from mmdiffkd.models.feature_maps import TapError
from tests import tiny


def reentrant_config(model):
    """Checkpoint two layers as the Runner does if a config sets ``activation_checkpointing``."""
    turn_on_activation_checkpointing(model, ['backbone.layer3', 'backbone.layer4'])


def non_reentrant(model):
    for layer in (model.backbone.layer3, model.backbone.layer4):
        forward = layer.forward
        layer.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)


def wrapped(model):
    """Checkpoint two layers as FSDP strategies do. This renames the modules."""
    layers = (model.backbone.layer3, model.backbone.layer4)
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    assert isinstance(model.backbone.layer3, CheckpointWrapper)


def gradients(folder, tap, prepare=None, levels=None, **student):
    """Return the gradients of the distillation losses."""
    distill = dict(feat=dict(student=tap, teacher=tap, levels=levels))
    model = tiny.build(tiny.distiller_cfg(folder, student=tiny.detector(**student), distill=distill))
    if prepare is not None:
        prepare(model)
    inputs = tiny.batch(model)
    torch.manual_seed(3)
    losses = model.loss(*inputs)
    sum(value for name, value in losses.items() if name.startswith('diffkd.') and 'loss' in name).backward()
    names = ((name.replace('_checkpoint_wrapped_module.', ''), p) for name, p in model.named_parameters())
    return {name: p.grad for name, p in names if p.grad is not None}


@pytest.mark.parametrize(
    'tap, prepare, student',
    [
        ('neck', None, {'backbone.with_cp': True}),
        ('backbone.layer3', None, {'backbone.with_cp': True}),
        ('backbone.layer3', reentrant_config, {}),
        ('neck', reentrant_config, {}),
        ('backbone.layer3.1', non_reentrant, {}),
        ('backbone.layer4.0.conv1', non_reentrant, {}),
        ('backbone.layer3', wrapped, {}),
        ('backbone.layer3.0.conv2', wrapped, {}),
    ],
)
def test_gradient_matches_without_checkpointing(tmp_path, tap, prepare, student):
    plain = gradients(tmp_path, tap)
    checkpointed = gradients(tmp_path, tap, prepare, **student)
    assert set(plain) == set(checkpointed)
    assert any(name.startswith('backbone.layer2') and grad.abs().sum() > 0 for name, grad in plain.items())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


@pytest.mark.parametrize(
    'tap, prepare, student',
    [
        ('backbone.layer3.1.conv1', None, {'backbone.with_cp': True}),
        ('backbone.layer3.1', reentrant_config, {}),
    ],
)
def test_lost_gradient_is_an_error(tmp_path, tap, prepare, student):
    with pytest.raises(ValueError, match='distill.feat: no gradient reaches the student through its tap'):
        gradients(tmp_path, tap, prepare, **student)


def test_calls_inside_checkpointed_modules_are_left_out(tmp_path):
    """A ResNet block calls its ReLU inside its checkpointed part, which is left out, and once after this part."""
    student, tap = {'backbone.with_cp': True}, 'backbone.layer3.1.relu'
    names = {name for name in gradients(tmp_path, tap, **student) if name.startswith('diffkd.')}
    assert {name.split('.')[3] for name in names} == {'0'}  # only one level is distilled
    with pytest.raises(TapError, match="no gradient reaches the student through its tap 'backbone.layer3.1.relu'"):
        gradients(tmp_path, tap, levels=[0], **student)


def test_selecting_a_frozen_level_is_an_error(tmp_path):
    with pytest.raises(TapError, match=r"tap 'backbone', level 0. Either the level is frozen: choose levels=\[2\]"):
        gradients(tmp_path, 'backbone', levels=[0, 2], **{'backbone.frozen_stages': 1})
