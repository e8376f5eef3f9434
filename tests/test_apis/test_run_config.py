import importlib
import os
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmdiffkd.apis import distill, load_run_config
from mmdiffkd.utils import read_config, resolve_config
from tests.conftest import ROOT


def load(tmp_path, **options):
    (tmp_path / 'my_run.py').write_text('x = 1\n')
    defaults = dict(cfg_options=None, work_dir=None, launcher='none', local_rank=0)
    return load_run_config(Namespace(config=str(tmp_path / 'my_run.py'), **dict(defaults, **options)))


def test_local_rank_of_the_launcher_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    load(tmp_path)
    assert os.environ['LOCAL_RANK'] == '1'


def test_local_rank_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    load(tmp_path, local_rank=1)
    assert os.environ['LOCAL_RANK'] == '1'
    monkeypatch.delenv('LOCAL_RANK')  # set by load_run_config, so monkeypatch does not restore it


@pytest.mark.situation(
    'places',
    'Launcher option without the launcher',
    '',
    'one sentence names the scripts that start the processes, instead of a missing environment variable.',
)
@pytest.mark.parametrize('launcher, script', [('pytorch', 'dist_train.sh'), ('slurm', 'slurm_train.sh')])
def test_launcher_that_has_not_started_the_process(tmp_path, monkeypatch, launcher, script):
    for name in ('RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f'is for processes that tools/{script} or .* starts.* leave out --launcher'):
        load(tmp_path, launcher=launcher)


def test_work_dir_is_a_file(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match="work_dir='.*file' is a file: give a folder"):
        load(tmp_path, work_dir=str(tmp_path / 'file'))


def test_work_dir(tmp_path):
    assert load(tmp_path).work_dir == os.path.join('work_dirs', 'my_run')
    assert load(tmp_path, cfg_options=dict(work_dir='mine')).work_dir == 'mine'
    assert load(tmp_path, cfg_options=dict(work_dir='mine'), work_dir='given').work_dir == 'given'


CONFIGS = dict(
    mmdet='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    mmseg='mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    mmpretrain='mmpretrain::resnet/resnet18_8xb32_in1k.py',
)


class Stopped(BaseException):
    """Ends a script before it trains."""


@pytest.fixture
def config_of_run(monkeypatch):
    """Function that runs a script up to the Runner, and returns the config that the Runner gets."""

    def run(start, *argv):
        seen = []

        def from_cfg(cfg):
            seen.append(cfg)
            raise Stopped

        monkeypatch.setattr(Runner, 'from_cfg', from_cfg)
        monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
        monkeypatch.setenv('LOCAL_RANK', '0')
        with pytest.raises(Stopped):
            start()
        return seen[0].to_dict()

    return run


def script(path):
    return lambda: runpy.run_path(str(path), run_name='__main__')


AMP = ('--amp', '--cfg-options', 'optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.loss_scale=512.0')


@pytest.mark.parametrize(
    'options', [(), ('--amp', '--auto-scale-lr'), AMP, ('--cfg-options', 'train_dataloader.pin_memory=False')]
)
@pytest.mark.parametrize('package', CONFIGS)
@pytest.mark.situation(
    'places',
    "Settings that mmpretrain's `train.py` adds to the config",
    'mmpretrain #1024, mmpretrain #1880',
    '`tools/train.py`, `distill()` and `mim train` add the same settings, so the Runner gets the same config.',
)
def test_same_run_as_mim_train(package, options, config_of_run, tmp_path):
    config = resolve_config(CONFIGS[package]).filename
    if package == 'mmseg':
        options = tuple(option for option in options if option != '--auto-scale-lr')  # mmseg lacks this option
    upstream = Path(importlib.import_module(package).__file__).parent / '.mim' / 'tools' / 'train.py'
    arguments = config, '--work-dir', tmp_path, *options
    expected = config_of_run(script(upstream), upstream, *arguments)
    found = config_of_run(script(ROOT / 'tools' / 'train.py'), 'train.py', *arguments)
    found.setdefault('resume', expected.get('resume'))  # mmseg's script always sets it
    assert found == expected
    if options:
        return
    student = Config.fromfile(config)
    teacher = Config(dict(model=student.model, default_scope=package))
    called = config_of_run(lambda: distill(student, teacher, 'x.pth', tmp_path))
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'optim_wrapper', 'train_cfg'):
        assert called[name] == expected[name]


def test_loader_without_workers(tmp_path):
    """torch refuses persistent workers without workers."""
    file = resolve_config(CONFIGS['mmpretrain']).filename
    options = {'train_dataloader.num_workers': 0, 'val_dataloader.persistent_workers': False}
    defaults = dict(cfg_options=options, work_dir='x', launcher='none', local_rank=0)
    cfg = load_run_config(Namespace(config=file, **defaults))
    assert [cfg[f'{name}_dataloader'].persistent_workers for name in ('train', 'val', 'test')] == [False, False, True]


@pytest.mark.parametrize('key', ['distill', 'teacher', 'preset', 'init_from_teacher'])
@pytest.mark.parametrize('tool', ['train', 'preview'])
def test_settings_of_the_distiller_outside_of_the_model(key, tool, tmp_path):
    model = "dict(type='mmdiffkd.DiffKDDistiller', student=dict(type='X', a='neck'))"
    text = f"model = {model}\n{key} = dict(fpn=dict(a='neck'))\n"
    with pytest.raises(ValueError, match=f'^{key} has no effect at the top level .* model=dict\\({key}=...\\)'):
        read(tool, tmp_path, text.encode())


@pytest.mark.parametrize(
    'text',
    [
        "teacher = 'a.py'\nmodel = dict(type='A', student=dict(type='X'), teacher=dict(config=teacher))",
        "distill = dict(fpn=dict(a=1))\nmodel = dict(type='A', student=dict(type='X'), distill=dict(b=1, **distill))",
        "distill = dict(fpn=dict(a=1))\nmodel = dict(type='X')",
        "preset = 'light'\nmodel = dict(type='A', student=dict(type='X'))\npipeline = [dict(policy=preset)]",
        "distill = dict(fpn=dict(a=1))\nmodel = dict(type='A', student=dict(type='X'), distill=dict(fpn=dict(a=2)))",
    ],
)
def test_variables_of_a_config_may_have_the_names_of_settings(text, tmp_path):
    assert read('train', tmp_path, text.encode()).model


@pytest.mark.parametrize('tool', ['train', 'preview'])
@pytest.mark.parametrize(
    'text, message',
    [
        (
            "model = dict(type='X')  # Läufe".encode('latin-1'),
            r"run\.py', .* is not saved as UTF-8 .*: save it as UTF-8\.$",
        ),
        (b"\xef\xbb\xbfmodel = dict(type='X')", r"run\.py', .* byte order mark: save it as UTF-8 without BOM\.$"),
        (b"model = dict(type='X'", r"run\.py', or a config that it inherits, is not valid Python"),
        (b"model = dict(type='X')\ncustom_hooks = dict(type='Y')", r'^custom_hooks must be a list'),
    ],
)
def test_configs_that_cannot_be_read(text, message, tool, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tool, tmp_path, text)


@pytest.mark.parametrize('tool', ['train', 'preview'])
def test_misspelled_custom_import(tool, tmp_path):
    text = b"custom_imports = dict(imports=['mmdifkd'], allow_failed_imports=False)\nmodel = dict(type='X')"
    with pytest.raises(ImportError, match=r"^custom_imports of '.*' cannot be imported: .*mmdifkd'?\. Check") as error:
        read(tool, tmp_path, text)
    assert '\n' not in str(error.value)


def read(tool, tmp_path, text):
    file = tmp_path / 'run.py'
    file.write_bytes(text)
    if tool == 'preview':
        return read_config(file)
    return load_run_config(Namespace(config=str(file), cfg_options=None, work_dir=None, launcher='none', local_rank=0))
