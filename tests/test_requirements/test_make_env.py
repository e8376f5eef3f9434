"""Test the progress display, the requirements, and the alias with which onedl-mim finds mmdet."""

import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import make_env
import pytest
from make_env import FAMILIES, Display, Environment, add_alias, pip_activity

from tests.conftest import ROOT


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_file_gets_one_line_per_minute(monkeypatch):
    clock = [0]
    monkeypatch.setattr(make_env.time, 'monotonic', lambda: clock[0])
    stream = io.StringIO()
    display = Display(stream)
    display.step('[1/2] first')
    for second in range(1, 130):
        clock[0] = second
        display.now(f'second {second}')
    assert stream.getvalue().splitlines() == ['[1/2] first', '      second 60', '      second 120']


def test_terminal_line_is_rewritten_in_place(monkeypatch):
    monkeypatch.setenv('COLUMNS', '40')
    stream = Terminal()
    display = Display(stream)
    display.now('first ' * 20)
    display.now('second')
    display.step('[2/2] next')
    lines = stream.getvalue().split('\r\033[K')[1:]
    assert [line.strip() for line in lines] == [('first ' * 20)[:33].strip(), 'second', '[2/2] next']
    assert stream.getvalue().count('\n') == 1


def test_pip_activity():
    assert pip_activity('') == 'pip is resolving packages'
    output = (
        'Collecting scipy (from mmdet)\n  Downloading scipy-1.17.whl (35.1 MB)\nRequirement already satisfied: six\n'
    )
    assert pip_activity(output) == 'downloading scipy-1.17.whl (35.1 MB)'
    assert pip_activity(output + 'Installing collected packages: a, b, c\n') == 'installing 3 packages'


@pytest.mark.parametrize('family', FAMILIES)
def test_requirements(family, tmp_path):
    env = Environment(tmp_path, family, Display())
    names = env.family['requirements']
    found = env.requirements(*names)
    rest = env.requirements(*names, without=env.family['mmcv'])
    (mmcv,) = set(found) - set(rest)
    assert re.match(r'[\w-]+', mmcv).group() == env.family['mmcv']
    assert re.fullmatch(r'\d+\.\d+\.\d+', env.version(env.family['mmcv']))
    assert any(line.startswith(env.family['mim']) for line in rest)
    assert not any('#' in line for line in found)


@pytest.mark.parametrize('number, refused', [((3, 10, 1), True), ((3, 13, 0), True), ((3, 12, 4), False)])
def test_python_version(number, refused, tmp_path):
    script = (
        f'import runpy, sys; sys.version_info = {number}; sys.path.insert(0, "requirements")\n'
        f'import make_env; make_env.make = print; sys.argv = ["make_env.py", {str(tmp_path)!r}]; make_env.main()'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 1) == refused
    assert ('Python 3.11 or 3.12 is needed' in done.stderr) == refused


class EnvironmentCopy:
    """A virtual environment with the packages of this one and a copy of mmdet, which can be uninstalled."""

    def __init__(self, folder):
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(folder)], check=True)
        self.python = folder / 'bin' / 'python'
        (self.packages,) = folder.glob('lib/*/site-packages')
        for path in Path(sysconfig.get_path('purelib')).iterdir():
            if path.name == 'mmdet':
                shutil.copytree(path, self.packages / path.name)
            elif not re.match('mmdet-|mmdiffkd|__editable__', path.name):
                (self.packages / path.name).symlink_to(path)
        self.files = self.count_files()

    def count_files(self):
        return sum(path.is_file() for path in (self.packages / 'mmdet').rglob('*.py'))

    def pip(self, *args):
        command = [self.python, '-m', 'pip', '--disable-pip-version-check', *args]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout

    def mmdet(self):
        """Return the version of the distribution named mmdet, and the folder in which mim finds mmdet."""
        script = 'import json, importlib.metadata as m; from mim.utils import get_installed_path, module_full_name\n'
        script += 'print(json.dumps((m.version("mmdet"), get_installed_path(module_full_name("mmdet")))))'
        return json.loads(subprocess.check_output([str(self.python), '-W', 'ignore', '-c', script], text=True))


def onedl_version():
    try:
        return version('onedl-mmdetection')
    except PackageNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(not onedl_version(), reason='the original packages need no alias')
def test_alias(tmp_path):
    env = EnvironmentCopy(tmp_path / 'env')
    for _ in range(2):  # the second time, the alias exists
        assert add_alias(env.python, 'mmdet', 'onedl-mmdetection') == onedl_version()
        assert env.mmdet() == [onedl_version(), str(env.packages / 'mmdet')]
    assert 'No broken requirements' in env.pip('check')
    assert re.search(rf'^mmdet +{re.escape(onedl_version())}$', env.pip('list'), re.MULTILINE)
    assert 'already satisfied' in env.pip('install', '--no-index', 'mmdet')
    # uninstalling the alias keeps the package's files
    assert 'Successfully uninstalled mmdet' in env.pip('uninstall', '--yes', 'mmdet')
    assert not list(env.packages.glob('mmdet-*')) and env.count_files() == env.files
    # a real distribution replaces the alias, and add_alias does not replace the distribution
    add_alias(env.python, 'mmdet', 'onedl-mmdetection')
    wheel = tmp_path / 'mmdet-9.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('mmdet-9.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: mmdet\nVersion: 9.0\n')
        archive.writestr('mmdet-9.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
        archive.writestr('mmdet-9.0.dist-info/RECORD', '')
    assert 'Successfully installed mmdet-9.0' in env.pip('install', '--no-index', wheel)
    assert add_alias(env.python, 'mmdet', 'onedl-mmdetection') is None
    assert [path.name for path in env.packages.glob('mmdet-*')] == ['mmdet-9.0.dist-info']
    assert env.count_files() == env.files
