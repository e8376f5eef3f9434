import contextlib
import ctypes
import functools
import gc
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

# Use one thread: tests run in parallel, and idle threads of a thread pool take CPU time. Processes that tests start
# inherit these settings.
os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')

import mmengine.config.utils  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from mmengine.logging import MessageHub, MMLogger  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.visualization import Visualizer  # noqa: E402

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
# for each config that inherits from a package, mmengine reads the package's model index, which takes half a second
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)


def pytest_addoption(parser):
    parser.addoption('--rotate', metavar='TEXT', help='rotate the order of the files by a hash of this text')
    parser.addoption('--gpu-device', choices=['cuda', 'cpu'], default='cuda', help='device of the tests marked gpu')
    parser.addoption('--until', type=float, metavar='SECONDS', help='skip tests that would start after this Unix time')


def pytest_collection_modifyitems(config, items):
    """Skip tests that need a GPU if there is none, and rotate the order of the files: ``--rotate`` sets the first."""
    if config.getoption('--gpu-device') == 'cuda' and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
    text = config.getoption('--rotate')
    if text:
        files = sorted({item.path for item in items})
        start = zlib.crc32(text.encode()) % max(len(files), 1)
        items.sort(key=lambda item: (files.index(item.path) - start) % len(files))


def pytest_collection_finish(session):
    """Exempt the imported packages from garbage collections: mmengine collects whenever it builds a data set."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    until = item.config.getoption('--until')
    if until and time.time() > until:
        pytest.skip('no time left')


@pytest.fixture(scope='session', autouse=True)
def unformatted_configs():
    """Skip the formatting of configs: mmengine calls yapf seven times per run, which takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ('yapf.yapflib.yapf_api', 'mmengine.config.config'):  # one module per package family
            patch.setattr(f'{module}.FormatCode', lambda text, **options: (text, False), raising=False)
        yield


@pytest.fixture(autouse=True)
def clean_globals():
    """Clear mmengine's global default scopes, loggers, message hubs and visualizers after each test."""
    yield
    forget_globals()


def forget_globals():
    for manager in (DefaultScope, MessageHub, MMLogger, Visualizer, *Visualizer.__subclasses__()):
        manager._instance_dict.clear()


@pytest.fixture(autouse=True)
def release_memory():
    """Return freed memory to the system: after tests of large models, glibc keeps gigabytes per worker."""
    yield
    statm = Path('/proc/self/statm')
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') > 2 * 2**30:
        gc.collect()
        getattr(ctypes.CDLL(None), 'malloc_trim', lambda pad: None)(0)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """Folder of a tiny generated detection data set."""
    out = tmp_path_factory.mktemp('shapes')
    make_shapes = load_tool('dataset_converters/make_shapes.py')
    for split, count in (('train', 8), ('val', 4)):
        make_shapes.write_split(out, split, count, 64, 0)
    return out


def load_tool(path):
    """Import a script of tools/ as a module."""
    file = ROOT / 'tools' / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_tool(path, *args, **options):
    """Run a script of tools/ in this process, which saves importing all packages again. See :func:`in_process`."""
    file = ROOT / 'tools' / path

    def start():
        sys.path.insert(0, str(file.parent))
        runpy.run_path(str(file), run_name='__main__')

    return in_process(start, file, *args, **options)


def in_process(start, *argv, cwd=ROOT, check=True, env=None):
    """Run a script in this process with its own arguments, folder and environment; capture output and exit code.

    Args:
        start (callable): Runs the script.
        *argv: Command line of the script.
        cwd (Path): Working directory.
        check (bool): Whether to assert that the script succeeds.
        env (dict, optional): Environment variables to add.

    Returns:
        subprocess.CompletedProcess: ``stdout`` contains standard output and standard error.
    """
    output, code = io.StringIO(), 0
    folder, command, path, environment = os.getcwd(), sys.argv, sys.path[:], dict(os.environ)
    forget_globals()  # remove existing loggers, which write to the original output
    try:
        os.chdir(cwd)
        os.environ.update(env or {})
        sys.argv = list(map(str, argv))
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                start()
            except SystemExit as error:
                code = error.code or 0
                if isinstance(code, str):
                    print(code)
                    code = 1
            except Exception:
                traceback.print_exc()
                code = 1
    finally:
        os.chdir(folder)
        sys.argv, sys.path[:] = command, path
        os.environ.clear()
        os.environ.update(environment)
        forget_globals()
    assert code == 0 or not check, output.getvalue()[-4000:]
    return subprocess.CompletedProcess(argv, code, output.getvalue())


def run_tool(path, *args, cwd=ROOT, check=True, env=None):
    """Run a script of tools/ in a separate process, as a user would."""
    command = [sys.executable, str(ROOT / 'tools' / path), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check:
        assert done.returncode == 0, done.stdout[-4000:]
    return done


def logged(work_dir):
    """Return all records of the run's JSON logs."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
