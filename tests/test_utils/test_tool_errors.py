import pytest
from mmengine.registry import MODELS

from mmdiffkd.utils import exit_on_mistake


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
        message.startswith('Error: Absent is not in the mmengine::model registry: check how') and 'http' not in message
    )


def test_faults_of_ours_are_raised():
    for error in (KeyError('x'), AttributeError('x'), ZeroDivisionError()):
        with pytest.raises(type(error)), exit_on_mistake():
            raise error


def test_nothing_happens_without_an_error(capsys):
    with exit_on_mistake():
        print('done')
    assert capsys.readouterr() == ('done\n', '')
