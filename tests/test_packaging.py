"""Build the wheel, install it in a new environment with the packages of this one, and use it with mim."""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdiffkd.utils import get_model_cfg
from mmdiffkd.version import __version__
from tests import tiny
from tests.conftest import ROOT, load_tool, logged
from tests.test_model_index import MODELS
from tests.test_tools.test_mim import LOADERS, detection

pytestmark = pytest.mark.slow
NO_SOURCE = shutil.ignore_patterns('_build', '.*', '__pycache__', '*.egg-info', 'build', 'data', 'dist', 'work_dirs')
DIST_INFO = f'mmdiffkd-{__version__}.dist-info'
TOOLS = sorted(path.relative_to(ROOT) for path in ROOT.glob('tools/**/*.py'))
CONFIG = 'diffkd_retinanet-r18-half_retinanet-r18-eighth_6e_shapes.py'


def run(*command, cwd, check=True):
    done = subprocess.run(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 or not check, done.stdout[-4000:]
    return done.stdout


def copy_source(folder):
    """Copy the repository without the files of earlier builds and runs."""
    return shutil.copytree(ROOT, folder, ignore=NO_SOURCE)


def build(source, out):
    """Build a wheel from a folder or an sdist, without the package index."""
    options = ('--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', out)
    run(sys.executable, '-m', 'pip', 'wheel', source, *options, cwd=out.parent)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from the sdist."""
    folder = tmp_path_factory.mktemp('build')
    source = copy_source(folder / 'source')
    script = f"from setuptools import build_meta; build_meta.build_sdist('{folder}')"
    run(sys.executable, '-c', script, cwd=source)
    return build(next(folder.glob('*.tar.gz')), folder / 'wheel')


class Environment:
    """A virtual environment with all packages of this one except mmdiffkd."""

    def __init__(self, folder):
        self.folder = folder
        self.python = folder / 'env' / 'bin' / 'python'
        run(sys.executable, '-m', 'venv', '--without-pip', folder / 'env', cwd=folder)
        packages = folder / 'packages'
        packages.mkdir()
        for path in Path(sysconfig.get_path('purelib')).iterdir():
            if 'mmdiffkd' not in path.name:
                (packages / path.name).symlink_to(path)
        self.packages = next((folder / 'env').glob('lib/*/site-packages'))
        (self.packages / 'packages.pth').write_text(f'{packages}\n')

    def __call__(self, *args, check=True):
        """Run the interpreter outside of the repository and return its output."""
        return run(self.python, '-W', 'ignore', *args, cwd=self.folder, check=check)

    def pip(self, *args):
        return self('-m', 'pip', '--disable-pip-version-check', *args)

    def mim(self, *args):
        return self('-m', 'mim', *args)


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp('installed'))
    environment.pip('install', '--no-index', wheel)
    return environment


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = ['model-index.yml', *(path.relative_to(ROOT).as_posix() for path in files_of('configs', 'tools'))]
    package = {path.relative_to(ROOT).as_posix() for path in files_of('mmdiffkd')}
    mim = {f'{folder}/.mim/{name}' for folder in ('mmdiffkd', DIST_INFO) for name in shipped}
    metadata = {f'{DIST_INFO}/{name}' for name in ('licenses/LICENSE', 'METADATA', 'WHEEL', 'top_level.txt', 'RECORD')}
    assert names == mim | package | metadata


def files_of(*folders):
    paths = [path for folder in folders for path in (ROOT / folder).rglob('*')]
    files = [path for path in paths if path.is_file() and not {'__pycache__', '.mim'} & set(path.parts)]
    return [path for path in files if path.suffix != '.pth']  # the demo's teacher is only in the repository


def test_build_ignores_earlier_builds(tmp_path):
    source = copy_source(tmp_path / 'source')
    first = set(zipfile.ZipFile(build(source, tmp_path / 'first')).namelist())
    (source / 'configs' / 'shapes' / CONFIG).unlink()
    second = set(zipfile.ZipFile(build(source, tmp_path / 'second')).namelist())
    assert first - second == {f'{folder}/.mim/configs/shapes/{CONFIG}' for folder in ('mmdiffkd', DIST_INFO)}
    assert not (source / 'mmdiffkd' / '.mim').exists()


def test_installation_leaves_other_packages_unchanged(wheel, tmp_path):
    environment = Environment(tmp_path)
    before = environment.pip('freeze').splitlines()
    planned = environment.pip('install', '--no-index', '--dry-run', wheel)
    assert f'Would install mmdiffkd-{__version__}\n' in planned
    environment.pip('install', '--no-index', wheel)
    after = environment.pip('freeze').splitlines()
    assert len(after) == len(before) + 1 and set(before) < set(after)
    environment.pip('uninstall', '--yes', 'mmdiffkd')
    assert environment.pip('freeze').splitlines() == before
    assert [path.name for path in environment.packages.iterdir()] == ['packages.pth']


def test_installed_configs_load(installed):
    script = """
from pathlib import Path
from mim.utils import get_installed_path
from mmengine.config import Config
from mmdiffkd.utils import resolve_config

folder = Path(get_installed_path('mmdiffkd'), '.mim', 'configs')
for path in folder.rglob('*.py'):
    cfg = Config.fromfile(path)
    if 'teacher' in cfg.get('model', {}):
        teacher = cfg.model.teacher.config
        assert '::' in teacher or Path(teacher).is_relative_to(folder), teacher
        resolve_config(teacher)
    print(path.relative_to(folder))
"""
    shipped = {str(path.relative_to(ROOT / 'configs')) for path in ROOT.glob('configs/**/*.py')}
    assert shipped <= set(installed('-c', script).splitlines())


def test_mim_list_and_search(installed):
    assert ['mmdiffkd', __version__] in [line.split() for line in installed.mim('list').splitlines()]
    listed = [model['Name'] for model in MODELS]
    assert str(listed) in installed.mim('search', 'mmdiffkd', '--valid-config')
    found = installed.mim('search', 'mmdiffkd', '--model', 'diffkd', '--dataset', 'coco', '--condition', 'epochs<24')
    assert 'diffkd_atss-r101_atss-r50_1x_coco' in found and 'retinanet' not in found
    for command in re.findall(
        r'^mim (search .*)', (ROOT / 'docs' / 'get_started' / 'installation.md').read_text(), re.MULTILINE
    ):
        assert 'configs/' in installed.mim(*shlex.split(command))
    found = installed.mim(
        'search', 'mmdiffkd', '--config', 'diffkd_resnet34_resnet18_100e_in1k', '--field', 'config', 'paper_top'
    )
    assert 'configs/imagenet/' in found and '72.22' in found  # the table wraps long cells


def test_tools_run_from_the_package(installed):
    assert len({tool.stem for tool in TOOLS}) == len(TOOLS)  # unique names, because mim finds tools by name
    script = """
import contextlib, runpy, sys
from pathlib import Path
from mim.utils import get_installed_path

for tool in sys.argv[1:]:
    sys.argv[:] = [str(Path(get_installed_path('mmdiffkd'), '.mim', tool)), '--help']
    sys.path[0] = str(Path(sys.argv[0]).parent)
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name='__main__')
"""
    shown = installed('-c', script, *TOOLS)
    assert [tool.name for tool in TOOLS if f'usage: {tool.name}' not in shown] == []


def test_mim_run(installed):
    config = next(installed.packages.glob(f'mmdiffkd/.mim/configs/shapes/{CONFIG}'))
    assert 'BottleneckDenoiser, 5 steps' in installed.mim('run', 'mmdiffkd', 'preview', config)


def test_demo_uses_the_working_directory(installed, monkeypatch):
    (installed.folder / 'work_dirs' / 'demo').mkdir(parents=True)
    (installed.folder / 'work_dirs' / 'demo' / 'settings.json').write_text('{}')
    done = installed('-m', 'mim', 'run', 'mmdiffkd', 'demo', check=False)
    assert f'{installed.folder}/work_dirs/demo was made with different settings' in done
    monkeypatch.chdir(installed.folder)
    monkeypatch.setattr(sys, 'argv', ['demo.py'])
    assert load_tool('demo.py').parse_args().work_dir == installed.folder / 'work_dirs' / 'demo'


def test_mim_train_finds_config_by_name(installed, shapes, tmp_path):
    teacher = Config.fromfile(ROOT / 'configs' / 'shapes' / 'retinanet-r18-half_16e_shapes.py')
    options = (
        *(f'{loader}.dataset.data_root={shapes}/' for loader in LOADERS),
        *(f'{split}_evaluator.ann_file={shapes}/annotations/val.json' for split in ('val', 'test')),
        f'model.teacher.checkpoint={tiny.write_checkpoint(get_model_cfg(teacher), tmp_path / "teacher.pth")}',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
        'model.student.test_cfg.score_thr=0.0',  # keep detections of a barely trained model
    )
    where = ('--gpus', 0, '--work-dir', tmp_path / 'run')
    done = installed.mim('train', 'mmdiffkd', CONFIG, *where, '--cfg-options', *options)
    assert 'Training finished successfully' in done
    records = logged(tmp_path / 'run')
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.gamma'} <= set(records[0]) and 'coco/bbox_mAP' in records[-1]


def test_editable(tmp_path):
    """An editable install copies no configs: onedl-mim searches the whole repository and must find each config once."""
    source = copy_source(tmp_path / 'source')
    environment = Environment(tmp_path)
    environment.pip('install', '--no-index', '--no-deps', '--no-build-isolation', '--editable', source)
    assert environment('-c', 'import mmdiffkd; print(mmdiffkd.__file__)') == f'{source}/mmdiffkd/__init__.py\n'
    assert not [path for folder in (source, environment.packages) for path in folder.rglob('.mim')]
    if detection() == 'mmdetection':  # not for openmim, which searches only site-packages
        script = (
            'from mim.utils import get_installed_path, recursively_find as find\n'
            f"print(find(get_installed_path('mmdiffkd'), '{CONFIG}', followlinks=True))"
        )
        assert environment('-c', script) == f"['{source}/configs/shapes/{CONFIG}']\n"
        assert "'diffkd_retinanet_r101_r50'" in environment.mim('search', 'mmdiffkd', '--valid-config')
