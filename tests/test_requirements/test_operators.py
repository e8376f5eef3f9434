"""Test checks, progress and error messages of builds. Build, interrupt and resume a small real extension."""

import fcntl
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import operators
import pytest
from operators import GIB, Build, SetupError, choose_jobs, explain_failure

FACTS = dict(torch='2.12.1', gpu=False, toolkit=False, python='3.11', platform='linux-x86_64', include='/none')
NINJA = '\nbuild a.o: compile a.cpp\n' * 78

SETUP = """
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
names = ['ext', 'first', 'second', 'slow']
extension = CppExtension('tiny_ops._ext', [f'tiny_ops/{name}.cpp' for name in names])
setup(name='tiny-ops', version='1.0', packages=['tiny_ops'], ext_modules=[extension],
      cmdclass=dict(build_ext=BuildExtension))
"""
MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ext", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__ext() { return PyModule_Create(&module); }
"""
# Fake compiler: it lists the files that it compiles, and waits at slow.cpp while a file `hold` exists next to itself.
COMPILER = """#!/bin/sh
here=$(dirname "$0")
for word in "$@"; do
    case $word in */tiny_ops/*.cpp) basename "$word" >> "$here/compiled" ;; esac
done
case $* in *slow.cpp*) while [ -e "$here/hold" ]; do sleep 0.1; done ;; esac
exec c++ "$@"
"""


@pytest.mark.parametrize('cores, memory, jobs', [(2, 24, 2), (8, 4, 2), (1, 24, 1), (2, 0.1, 1)])
def test_jobs_from_cores_and_memory(cores, memory, jobs):
    assert choose_jobs(cores, memory * GIB) == jobs


def test_available_cores_and_memory():
    assert operators.available_cores() >= 1
    assert 2**20 < operators.available_memory() < 2**50


def test_memory_of_a_container(monkeypatch, tmp_path):
    """The cache of files counts as used, but is freed if a process needs memory."""
    for name, text in dict(max='1000\n', current='900\n', stat='anon 100\ninactive_file 700\n').items():
        (tmp_path / f'memory.{name}').write_text(text, 'utf-8')
    monkeypatch.setattr(operators, 'CGROUP', tmp_path)
    assert operators.available_memory() == 800


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(SetupError, match=r'no C\+\+ compiler.*apt install g\+\+'):
        operators.check_build(FACTS, tmp_path)


def test_no_headers(tmp_path):
    with pytest.raises(SetupError, match=r'headers of Python 3\.11 are missing.*apt install python3\.11-dev'):
        operators.check_build(dict(FACTS, include=str(tmp_path)), tmp_path)


def with_headers(folder):
    """Create ``Python.h``, and describe an environment that meets all requirements of a build."""
    (folder / 'Python.h').touch()
    return dict(FACTS, include=str(folder))


def test_old_compiler(tmp_path, monkeypatch):
    compiler = tmp_path / 'old-c++'
    compiler.write_text('#!/bin/sh\necho "unrecognized option -std=c++17" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    with pytest.raises(SetupError, match=r'g\+\+ 9 or newer(.|\n)*unrecognized option'):
        operators.check_build(with_headers(tmp_path), tmp_path)


def test_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, 'available_memory', lambda: 0.5 * GIB)
    monkeypatch.delenv('MAX_JOBS', raising=False)
    with pytest.raises(SetupError, match='free memory, but only 0.5 GiB are free'):
        operators.check_build(with_headers(tmp_path), tmp_path)
    monkeypatch.setenv('MAX_JOBS', '1')
    operators.check_build(with_headers(tmp_path), tmp_path)


def test_little_disk(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(SetupError, match=f'are free in {tmp_path}'):
        operators.check_disk(tmp_path / 'not' / 'there', 2 * free, 'the build')
    monkeypatch.setattr(operators, 'BUILD_DISK', 2 * free)
    with pytest.raises(SetupError, match="Compiling mmcv's operators needs"):
        operators.check_build(with_headers(tmp_path), tmp_path)


def test_gpu_without_toolkit(tmp_path):
    with pytest.raises(SetupError, match='CUDA_HOME.*CUDA_VISIBLE_DEVICES='):
        operators.check_build(dict(with_headers(tmp_path), gpu=True), tmp_path)


def started(folder, log):
    """Write the files that exist while ninja runs, and return their build."""
    temporary = folder / 'source' / 'build' / 'temp.linux'
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / 'build.ninja').write_text(NINJA)
    (folder / 'build.log').write_text(log)
    return Build(sys.executable, 'mmcv', '2.1.0', folder, FACTS)


def test_progress(tmp_path, monkeypatch):
    monkeypatch.setenv('MAX_JOBS', '2')
    assert Build(sys.executable, 'mmcv', '2.1.0', tmp_path, FACTS).status() == 'operators: starting'
    build = started(tmp_path, '[1/78] c++ -c a.cpp -o a.o\n')
    now = time.monotonic()
    monkeypatch.setattr(operators.time, 'monotonic', lambda: now)
    assert build.status() == 'operators: file 2 of 78'  # one file is too few for an estimate
    build.log.write_text('[1/78] c++ ...\na.cpp: warning [3/4]\n[36/78] c++ ...\n')
    monkeypatch.setattr(operators.time, 'monotonic', lambda: now + 6 * 60)
    assert build.status() == 'operators: file 37 of 78, about 7 minutes left'
    monkeypatch.setattr(operators.time, 'monotonic', lambda: now + 8 * 60)  # the same file, later
    assert build.status() == 'operators: file 37 of 78, about 5 minutes left'
    monkeypatch.setattr(operators.time, 'monotonic', lambda: now + 20 * 60)
    assert build.status() == 'operators: file 37 of 78, less than a minute left'
    build.log.write_text('[78/78] c++ ...\n')
    assert build.status() == 'operators: 78 files compiled, linking'


def test_progress_of_a_resumed_build(tmp_path):
    assert started(tmp_path, '[3/40] c++ -c a.cpp -o a.o\n').status() == 'operators: file 42 of 78'


@pytest.mark.parametrize(
    'error, advice',
    [
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('a.s: No space left on device', 'disk is full'),
        ('a.cpp:1:10: fatal error: Python.h: No such file or directory', 'python3.11-dev'),
        (
            '#error C++20 or later compatible compiler is required to use PyTorch.',
            'do not fit: install the version of torch in',
        ),
        ('a.cpp:3: error: no member named x', 'tested with'),
    ],
)
def test_failure_message_has_advice(tmp_path, error, advice):
    log = tmp_path / 'build.log'
    command = 'c++ -I/x -c /source/a.cpp -o /source/a.o ' + '-DX ' * 999
    noise = 'Traceback (most recent call last):\n' + '  File "setup.py"\n' * 40
    log.write_text(f'[1/2] {command}\n[2/2] {command}\nFAILED: a.o\n{command}\n{error}\nninja: build stopped\n{noise}')
    message = explain_failure(log, 'mmcv', FACTS)
    assert error in message and advice in message and str(log) in message
    assert 'Traceback' not in message and command not in message


def test_same_build_waits_for_the_first(tmp_path):
    (tmp_path / 'mmcv-2.1.0.whl').touch()  # the first build has finished its wheel
    messages = []
    with open(tmp_path / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = Build(sys.executable, 'mmcv', '2.1.0', tmp_path, FACTS)
        thread = threading.Thread(target=build.start, args=(messages.append, messages.append))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and 'waiting' in messages[0] and messages[1] == 'operators: starting'
    thread.join(10)
    assert not thread.is_alive() and build.process is None
    assert build.finish() == tmp_path / 'mmcv-2.1.0.whl'


def test_wheel_without_operators_does_not_fit(tmp_path):
    with zipfile.ZipFile(tmp_path / 'lite.whl', 'w') as archive:
        archive.writestr('mmcv/__init__.py', '')
    assert not operators.fits(sys.executable, tmp_path / 'lite.whl', FACTS)


def test_truncated_wheel_does_not_fit(tmp_path):
    (tmp_path / 'half.whl').write_bytes(b'PK')
    assert not operators.fits(sys.executable, tmp_path / 'half.whl', FACTS)


@pytest.mark.slow
def test_wheel_for_another_torch_does_not_fit(tmp_path):
    with zipfile.ZipFile(tmp_path / 'broken.whl', 'w') as archive:
        archive.writestr('mmcv/_ext.so', 'no library')
    assert not operators.fits(sys.executable, tmp_path / 'broken.whl', FACTS)


class TinyBuild:
    """Source of a real extension with four files, which ``COMPILER`` compiles."""

    def __init__(self, folder, monkeypatch):
        monkeypatch.setenv('XDG_CACHE_HOME', str(folder / 'cache'))
        monkeypatch.setenv('MAX_JOBS', '4')
        self.compiler = folder / 'bin' / 'c++'
        self.compiler.parent.mkdir()
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        monkeypatch.setenv('CXX', str(self.compiler))
        self.hold = self.compiler.with_name('hold')
        self.facts = operators.read_facts(sys.executable)
        self.folder = operators.cache_folder('tiny-ops', '1.0', self.facts)
        self.package = self.folder / 'source' / 'tiny_ops'
        self.package.mkdir(parents=True)
        self.package.with_name('setup.py').write_text(SETUP)
        (self.package / '__init__.py').touch()
        (self.package / 'ext.cpp').write_text(MODULE)
        for name in ('first', 'second', 'slow'):
            (self.package / f'{name}.cpp').write_text(f'int {name}() {{ return 0; }}\n')

    def start(self):
        return Build(sys.executable, 'tiny-ops', '1.0', self.folder, self.facts).start()

    def compiled(self):
        return sorted(self.compiler.with_name('compiled').read_text().split())


@pytest.fixture
def tiny_build(tmp_path, monkeypatch):
    return TinyBuild(tmp_path, monkeypatch)


def wait_until(condition, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.slow
def test_interrupted_build_is_resumed(tiny_build, monkeypatch):
    tiny_build.hold.touch()
    build = tiny_build.start()
    wait_until(lambda: build.step()[0] == 3)
    assert build.compiling() and build.status().startswith('operators: file 4 of 4')
    build.stop()
    assert not build.running()
    tiny_build.hold.unlink()
    build = tiny_build.start()
    wheel = build.finish()
    assert tiny_build.compiled() == ['ext.cpp', 'first.cpp', 'second.cpp', 'slow.cpp', 'slow.cpp']
    assert operators.fits(sys.executable, wheel, tiny_build.facts)
    assert not (tiny_build.folder / 'source').exists()
    # the wheel is found in the cache, by pip and in mim's index
    find = (sys.executable, 'tiny-ops', '1.0', tiny_build.facts)
    messages = []
    assert operators.find_wheel(*find, say=messages.append) == wheel
    assert messages == [f'wheel from an earlier setup: {wheel}']
    sources = shutil.copytree(tiny_build.folder, tiny_build.compiler.parent / 'wheels')
    shutil.rmtree(tiny_build.folder)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(sources))
    assert operators.find_wheel(*find, say=messages.append) == wheel
    assert messages[1:] == [f'prebuilt wheel from pip: {wheel.name}']
    shutil.rmtree(tiny_build.folder)
    monkeypatch.delenv('PIP_FIND_LINKS')
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('MMCV_BASE_URL', tiny_build.compiler.parent.as_uri())
    assert operators.find_wheel(*find) is None
    index = Path(urlparse(operators.call([sys.executable, '-W', 'ignore', '-c', operators.FIND_INDEX])).path)
    index.parent.mkdir(parents=True)
    index.write_text(f'<a href="{(sources / wheel.name).as_uri()}">{wheel.name}</a>')
    assert operators.find_wheel(*find, say=messages.append) == wheel
    assert messages[2:] == [f"wheel from mim's index: {wheel.name}"]


@pytest.mark.slow
def test_failed_build_shows_compiler_output_and_keeps_compiled_files(tiny_build):
    slow = tiny_build.package / 'slow.cpp'
    slow.write_text('#error "this file cannot be compiled"\n')
    build = tiny_build.start()
    with pytest.raises(SetupError, match='this file cannot be compiled') as raised:
        build.finish()
    assert 'Traceback' not in str(raised.value)
    slow.write_text('int slow() { return 0; }\n')
    assert tiny_build.start().finish().name.startswith('tiny_ops-1.0')
    assert tiny_build.compiled().count('first.cpp') == 1


@pytest.mark.slow
def test_lock_holds_while_a_compiler_runs(tiny_build):
    """A killed setup leaves its compiler running, and the next setup must wait for it."""
    tiny_build.hold.touch()
    script = (
        f'import sys; sys.path.insert(0, {str(Path(operators.__file__).parent)!r})\n'
        f'from operators import Build; from pathlib import Path\n'
        f'Build({sys.executable!r}, "tiny-ops", "1.0", Path({str(tiny_build.folder)!r}), {tiny_build.facts!r}).start()'
    )
    subprocess.run([sys.executable, '-c', script], check=True)
    with open(tiny_build.folder / 'lock', 'w') as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    tiny_build.hold.unlink()
    tiny_build.start().finish()
    assert len(tiny_build.compiled()) == 4
