import gc
import os
import subprocess
import sys

import pytest
from mmengine.registry import MODELS

from mmdiffkd.cli import exit_on_mistake, without_gc
from tests.conftest import ROOT


@pytest.mark.parametrize(
    'error', [ValueError, FileNotFoundError, PermissionError, ModuleNotFoundError, RuntimeError, SyntaxError, TypeError]
)
def test_mistakes_end_with_their_sentence(error, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_mistake():
        raise error('The file is absent; give another.')
    assert ended.value.code == 2
    assert capsys.readouterr() == ('', 'Error: The file is absent; give another.\n')


def test_types_that_are_not_registered(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_mistake():
        MODELS.build(dict(type='Absent'))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert (
        message.startswith('Error: Absent is not in the mmengine::model registry: check the spelling')
        and 'http' not in message
    )


def test_faults_of_ours_are_raised():
    for error in (KeyError('x'), AttributeError('x'), ZeroDivisionError()):
        with pytest.raises(type(error)), exit_on_mistake():
            raise error


def test_nothing_happens_without_an_error(capsys):
    with exit_on_mistake():
        print('done')
    assert capsys.readouterr() == ('done\n', '')


def test_garbage_collection_is_off_for_a_while():
    """In another's process nothing else changes: what is there is collected as before."""
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
def test_what_is_there_is_kept_in_a_process_of_its_own(tmp_path, is_own):
    script = tmp_path / 'script.py'
    script.write_text(
        'import gc, sys\nfrom mmdiffkd.cli import own_process, without_gc\n'
        'own_process()\nwith without_gc():\n    pass\n'
        'print(gc.isenabled(), gc.get_freeze_count() > 0, "torch" in sys.modules)'
    )
    another = 'import runpy, sys\nsys.argv = sys.stdin.read().split()\nrunpy.run_path(sys.argv[0], run_name="__main__")'
    command = [sys.executable, str(script)] if is_own else [sys.executable, '-c', another]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=env, input=str(script), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['True', str(is_own), 'False']


@pytest.mark.parametrize(
    'tool', ['train.py', 'test.py', 'analysis_tools/preview.py', 'misc/make_config.py', 'analysis_tools/report.py']
)
def test_tools_read_their_arguments_before_they_import_torch(tool):
    code = f'import runpy, sys\nrunpy.run_path({str(ROOT / "tools" / tool)!r})\nprint("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'
