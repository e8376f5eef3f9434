import pytest
import torch
from mmengine.config import Config

from mmdiffkd.apis import student_config, student_weights
from mmdiffkd.utils import resolve_config
from tests import tiny


def config(**changes):
    text = f"""
_base_ = '{tiny.RETINANET}'
custom_imports = dict(imports=['mmdiffkd', 'os'], allow_failed_imports=False)
custom_hooks = [dict(type='mmdiffkd.NonFiniteHook'), dict(type='NumClassCheckHook')]
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook', max_keep_ckpts=2))
model = dict(_delete_=True, type='mmdiffkd.DiffKDDistiller', student=_base_.model, teacher=dict(config='x'))
"""
    return Config.fromstring(text, '.py')


def test_config_is_the_base_again():
    plain, base = student_config(config()), resolve_config(tiny.RETINANET)
    assert plain.model.to_dict() == base.model.to_dict()
    assert plain.custom_imports.imports == ['os']
    assert [hook.type for hook in plain.custom_hooks] == ['NumClassCheckHook']
    assert plain.default_hooks.checkpoint.type == base.default_hooks.checkpoint.type == 'CheckpointHook'
    assert plain.default_hooks.checkpoint.max_keep_ckpts == 2
    assert 'mmdiffkd' not in plain.pretty_text


def test_single_import_as_a_string():
    cfg = config()
    cfg.custom_imports = dict(imports='mmdiffkd')
    assert 'custom_imports' not in student_config(cfg)


def test_config_of_a_resumed_run():
    cfg = config()
    cfg.resume = True
    assert student_config(cfg).resume is False


def test_plain_config_is_an_error():
    with pytest.raises(ValueError, match='is not a distillation config: its model is a plain RetinaNet'):
        student_config(resolve_config(tiny.RETINANET))


def test_weights_are_slim(tmp_path):
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    content = dict(
        state_dict=model.state_dict(),
        optimizer=dict(state={}),
        meta=dict(dataset_meta=dict(classes=('a',)), epoch=3, cfg='long text'),
    )
    torch.save(content, tmp_path / 'epoch_3.pth')
    slim = student_weights(str(tmp_path / 'epoch_3.pth'))
    assert set(slim) == {'state_dict', 'meta'}
    assert not any(key.startswith('diffkd.') for key in slim['state_dict'])
    assert slim['meta'] == dict(dataset_meta=dict(classes=('a',)), epoch=3)
