import gc
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS

from mmdiffkd.cli import exit_on_mistake, quiet_packages, without_gc
from mmdiffkd.utils import read_config
from tests.conftest import ROOT


@pytest.mark.parametrize('error', [ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError, SyntaxError])
def test_user_errors_exit_with_their_message(error, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_mistake():
        raise error('The file is absent; give another.')
    assert ended.value.code == 2
    assert capsys.readouterr() == ('', 'Error: The file is absent; give another.\n')


def test_unregistered_type(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_mistake():
        MODELS.build(dict(type='Absent'))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert (
        message.startswith('Error: Absent is not in the mmengine::model registry: check the spelling')
        and 'http' not in message
    )


@pytest.mark.parametrize(
    'registry, kind, nearest',
    [
        (MODELS, 'DiffKDDistiller', 'mmdiffkd.DiffKDDistiller'),
        (MODELS, 'mmdiffkd.DiffKDDistiler', 'mmdiffkd.DiffKDDistiller'),
        (HOOKS, 'DistilScheduleHook', 'mmdiffkd.DistillScheduleHook'),
        (HOOKS, 'mmdiffkd.NonFiniteHok', 'mmdiffkd.NonFiniteHook'),
    ],
)
def test_unregistered_type_like_a_class_of_mmdiffkd(registry, kind, nearest, capsys):
    with pytest.raises(SystemExit), exit_on_mistake():
        registry.build(dict(type=kind))
    assert capsys.readouterr().err.endswith(f"registry: the nearest is '{nearest}'.\n")


def unpack_too_few():
    first, second = (1,)
    return first, second


def failing_hook():
    raise TypeError('unsupported operand')


@pytest.mark.parametrize(
    'error, bug',
    [
        (KeyError, lambda: {}['x']),
        (AttributeError, lambda: Config(dict(x=1)).y),
        (ZeroDivisionError, lambda: 1 / 0),
        (RuntimeError, lambda: torch.zeros(2) @ torch.zeros(3)),
        (TypeError, failing_hook),
        (ValueError, unpack_too_few),
        (ValueError, lambda: np.zeros(2) + np.zeros(3)),
        (ValueError, lambda: torch.ones(1).numpy().reshape(2)),
    ],
)
def test_internal_errors_are_raised(error, bug):
    with pytest.raises(error), exit_on_mistake():
        bug()


@pytest.mark.parametrize(
    'text, options, message',
    [
        ("model = dict(type='X', a=undefined)", {}, "NameError in line 1: name 'undefined' is not defined"),
        ("model = dict(type='X'", {}, 'is not valid Python'),
        ("model = dict(type='X', a=3)", {'model.a': dict(b=1)}, 'a is a dict in the child config but is of type'),
        ("model = dict(type='X', a=[3])", {'model.a.5': 1}, 'Index 5 exceeds the length'),
        ("_base_ = './absent.py'", {}, 'absent.py'),
        ("custom_imports = dict(imports='not_installed')\nmodel = dict(type='X')", {}, 'not_installed'),
    ],
)
def test_mistakes_in_a_config(text, options, message, tmp_path, capsys):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(SystemExit) as ended, exit_on_mistake():
        read_config(tmp_path / 'config.py', options)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith('Error: ') and message in error


@pytest.mark.parametrize(
    'cfg, message',
    [
        (dict(type='mmdiffkd.MSELoss', weight=1), 'weight is not an argument of MSELoss'),
        (dict(loss_weight=1), 'must contain the key "type"'),
    ],
)
def test_mistakes_in_arguments(cfg, message, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_mistake():
        MODELS.build(cfg)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_quiet_packages(capsys, recwarn):
    with quiet_packages():
        print('imported')
        warnings.warn('old name', stacklevel=2)
    with pytest.raises(ValueError, match='is raised'), quiet_packages():
        raise ValueError('is raised')
    print('done')
    assert capsys.readouterr() == ('done\n', '') and not recwarn.list


def test_no_error(capsys):
    with exit_on_mistake():
        print('done')
    assert capsys.readouterr() == ('done\n', '')


def test_garbage_collection_is_off_within_the_context():
    """After the context, the old setting is restored. No objects are frozen, because other code owns the process."""
    frozen = gc.get_freeze_count()
    with pytest.raises(ValueError), without_gc():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    gc.disable()
    try:
        with without_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize('is_own', [True, False])
def test_objects_are_frozen_only_in_own_process(tmp_path, is_own):
    script = tmp_path / 'script.py'
    script.write_text(
        'import gc, sys\nfrom mmdiffkd.cli import own_process, without_gc\n'
        'own_process()\nwith without_gc():\n    pass\n'
        'print(gc.isenabled(), gc.get_freeze_count() > 0, "torch" in sys.modules)'
    )
    wrapper = 'import runpy, sys\nsys.argv = sys.stdin.read().split()\nrunpy.run_path(sys.argv[0], run_name="__main__")'
    command = [sys.executable, str(script)] if is_own else [sys.executable, '-c', wrapper]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=env, input=str(script), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['True', str(is_own), 'False']


@pytest.mark.parametrize(
    'tool', ['train.py', 'test.py', 'analysis_tools/preview.py', 'misc/make_config.py', 'analysis_tools/report.py']
)
def test_tools_parse_arguments_before_importing_torch(tool):
    code = f'import runpy, sys\nrunpy.run_path({str(ROOT / "tools" / tool)!r})\nprint("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'
