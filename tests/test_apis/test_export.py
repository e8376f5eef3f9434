import importlib
import re

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.apis import get_model, inference_model

from mmdiffkd.apis import student_config, student_weights
from mmdiffkd.utils import resolve_config
from tests import tiny
from tests.conftest import call_tool
from tests.test_apis.conftest import PAGE, SIZE


def config(**changes):
    text = f"""
_base_ = '{tiny.RETINANET}'
custom_imports = dict(imports=['mmdiffkd', 'os'], allow_failed_imports=False)
custom_hooks = [dict(type='mmdiffkd.NonFiniteHook'), dict(type='NumClassCheckHook')]
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook', max_keep_ckpts=2))
model = dict(_delete_=True, type='mmdiffkd.DiffKDDistiller', student=_base_.model, teacher=dict(config='x'))
"""
    return Config.fromstring(text, '.py')


def test_exported_config_equals_the_base():
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


def test_resume_is_turned_off():
    cfg = config()
    cfg.resume = True
    assert student_config(cfg).resume is False


def test_plain_config_is_an_error():
    with pytest.raises(ValueError, match='is not a distillation config: its model is a plain RetinaNet'):
        student_config(resolve_config(tiny.RETINANET))


def test_only_student_weights_are_exported(tmp_path):
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    content = dict(
        state_dict=model.state_dict(),
        optimizer=dict(state={}),
        meta=dict(dataset_meta=dict(classes=('a',)), epoch=3, cfg='long text'),
    )
    torch.save(content, tmp_path / 'epoch_3.pth')
    exported = student_weights(str(tmp_path / 'epoch_3.pth'))
    assert set(exported) == {'state_dict', 'meta'}
    assert not any(key.startswith('diffkd.') for key in exported['state_dict'])
    assert exported['meta'] == dict(dataset_meta=dict(classes=('a',)), epoch=3)


def run_config(tmp_path, name='run.py'):
    """Write the config and the checkpoint of a run, and return the config's path."""
    cfg = tiny.unformatted(Config(dict(model=tiny.distiller_cfg(tmp_path), custom_imports=dict(imports=['mmdiffkd']))))
    torch.save(dict(state_dict=tiny.build(cfg.model).state_dict(), meta={}), tmp_path / 'epoch_1.pth')
    cfg.dump(tmp_path / name)
    return tmp_path / name


@pytest.mark.situation(
    'after',
    'Export of the wrong checkpoint, or to a path where the run has a file',
    '',
    'mmdiffkd raises an error if the weights do not fit the student of the config. It does not overwrite files of the '
    'run.',
)
def test_wrong_files_are_refused(tmp_path):
    config = run_config(tmp_path)
    tool, checkpoint, out = 'model_converters/export_student.py', tmp_path / 'epoch_1.pth', tmp_path / 'out.pth'
    content = checkpoint.read_bytes()
    for arguments, message in (
        ((config, tmp_path / 'teacher.pth', out), 'do not fit the student of the config: backbone.conv1.weight'),
        ((config, checkpoint, checkpoint), 'is the checkpoint of the run and would be overwritten'),
        ((config, checkpoint, out, '--config-out', config), 'is the config of the run and would be overwritten'),
        ((config, checkpoint, out, '--config-out', out.with_suffix('.txt')), 'must end with .py or'),
        ((config, checkpoint, tmp_path), 'is a folder: give the name of a file in it'),
        ((config, checkpoint, out, '--config-out', tmp_path), 'is a folder: give the name of a file in it'),
        ((config, checkpoint, config / 'out.pth'), 'cannot be written, because'),
    ):
        assert message in call_tool(tool, *arguments, check=False).stdout
    assert checkpoint.read_bytes() == content and not out.exists()
    call_tool(tool, config, checkpoint, out, '--config-out', tmp_path / 'student.py')
    exported = call_tool(tool, tmp_path / 'student.py', checkpoint, tmp_path / 'again.pth', check=False).stdout
    assert "use the run's own config" in exported


def test_deeper_teacher_does_not_fit(tmp_path):
    """All weights of the student are in the file, in the same shapes."""
    cfg = Config.fromfile(run_config(tmp_path))
    deep = tiny.detector()
    deep.backbone.depth = 34
    path = tiny.write_checkpoint(deep, tmp_path / 'deep.pth')
    with pytest.raises(ValueError, match=r'do not fit the student of the config: unexpected backbone\.layer1\.2'):
        student_weights(path, cfg)
    student_weights(tiny.write_checkpoint(tiny.detector(), tmp_path / 'plain.pth'), cfg)


def test_checkpoint_without_modules_of_the_distillation(tmp_path, capfd):
    """Presets such as ``kd`` train no module of their own."""
    cfg = Config.fromfile(run_config(tmp_path))
    student_weights(tiny.write_checkpoint(tiny.detector(), tmp_path / 'plain.pth'), cfg)
    assert 'has only the weights of the student, so nothing was left out' in capfd.readouterr().out


def test_exported_files_do_not_need_this_package(exported):
    assert 'mmdiffkd' not in Config.fromfile('student.py').pretty_text
    assert not any(key.startswith('diffkd.') for key in torch.load('student.pth', weights_only=True)['state_dict'])


def test_inference(exported):
    """Run the calls in the table of the page "Export and deploy" that belong to the student's package."""
    row = re.search(rf'^\| {exported} \| `(.*)` \| `(\w+)`(?:, `(\w+)`)? \|$', PAGE.read_text(), re.MULTILINE)
    inferencer, init, infer = row.groups()
    apis = importlib.import_module(f'{exported}.apis')
    mmcv.imwrite(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8), 'image.png')
    assert eval(inferencer, vars(apis))('image.png')
    model = getattr(apis, init)('student.py', 'student.pth', device='cpu')
    if infer is not None:
        assert getattr(apis, infer)(model, 'image.png')
    weights = torch.load('student.pth', weights_only=True)['state_dict']
    from_run = getattr(apis, init)('student.py', 'run.pth', device='cpu')  # with the diffusion module
    for loaded in (model, from_run):
        assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize('exported', ['mmpretrain'], indirect=True)
def test_inference_model_of_mmpretrain_needs_its_zoo(exported):
    model = get_model('student.py', 'student.pth')
    with pytest.raises(NotImplementedError, match='No available inferencer'):
        inference_model(model, 'image.png')
