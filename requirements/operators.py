"""Find a prebuilt wheel of mmcv whose operators fit the installed torch, or compile one.

``make_env.py`` uses this module, which needs only the standard library. The source, the compiled files and the wheel
are cached in ``~/.cache/mmdiffkd/operators`` (``XDG_CACHE_HOME`` replaces ``~/.cache``). All clones and environments
share this cache.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

GIB = 2**30
JOB_MEMORY = 2 * GIB  # for one compiler process: mmcv's largest file takes 1.8 GiB
BUILD_DISK = 1 * GIB  # for object files without debug info, the library and the wheel
CGROUP = Path('/sys/fs/cgroup')  # limits of the container
INDEX_SECONDS = 5  # timeout for mim's index of wheels, which many networks block
NINJA_STEP = re.compile(rb'^\[(\d+)/(\d+)\]', re.MULTILINE)

# Script that prints, as JSON, the properties of the environment on which the operators depend.
FACTS = """
import json, os, sys, sysconfig, torch
from torch.utils import cpp_extension
forced = os.environ.get('FORCE_CUDA') == '1'
home = cpp_extension.CUDA_HOME or cpp_extension.ROCM_HOME
toolkit = home and any(os.path.exists(os.path.join(home, 'bin', name)) for name in ('nvcc', 'hipcc'))
print(json.dumps(dict(
    torch=torch.__version__, gpu=forced or torch.cuda.is_available(), toolkit=bool(toolkit),
    python='%d.%d' % sys.version_info[:2], platform=sysconfig.get_platform(), include=sysconfig.get_path('include'))))
"""

# Script that loads only the compiled library, because mmcv's Python code needs packages that may not be installed yet.
LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location('_ext', sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
if sys.argv[2] == 'gpu' and getattr(library, 'get_compiling_cuda_version', str)() == 'not available':
    sys.exit('compiled without CUDA')
"""

# Scripts that print the path of the installed package's library, and the URL of mim's index of wheels.
FIND_LIBRARY = """
import glob, importlib.util, os, sys
spec = importlib.util.find_spec(sys.argv[1])
print(*glob.glob(os.path.join(os.path.dirname(spec.origin), '_ext*.so')) if spec and spec.origin else ())
"""
FIND_INDEX = """
import os
from mim.commands.install import get_mmcv_full_find_link
from mim.utils import DEFAULT_MMCV_BASE_URL
print(get_mmcv_full_find_link(os.environ.get('MMCV_BASE_URL', DEFAULT_MMCV_BASE_URL)))
"""
# Script that fails if a URL cannot be opened within a number of seconds.
REACH = 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2]))'


class SetupError(Exception):
    """Setup failure, with a message for the user about the problem and the fix."""


def call(command, timeout=None):
    """Return the output of a command; ``None`` if it failed or took longer than ``timeout`` seconds."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_facts(python):
    """Read the properties of an environment that ``FACTS`` prints, such as the versions of torch and Python."""
    done = subprocess.run([str(python), '-W', 'ignore', '-c', FACTS], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f'torch cannot be imported in {Path(python).parent.parent}:\n{done.stderr.strip()}')
    return json.loads(done.stdout)


def cache_folder(package, version, facts):
    """Return the cache folder of the operators for this torch, Python and platform."""
    root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    device = 'cuda' if facts['gpu'] else 'cpu'
    name = f'{package}-{version}-torch{facts["torch"]}-{device}-python{facts["python"]}-{facts["platform"]}'
    return root / 'mmdiffkd' / 'operators' / name


def loads(python, library, facts):
    """Check whether a compiled library loads with the installed torch, and supports the GPU if there is one."""
    return call([python, '-W', 'ignore', '-c', LOAD, library, 'gpu' if facts['gpu'] else 'cpu']) is not None


def fits(python, wheel, facts):
    """Check whether a wheel contains operators that fit the installed torch."""
    if not zipfile.is_zipfile(wheel):
        return False
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.fullmatch(r'[^/]+/_ext[^/]*\.so', name)]
        return len(libraries) == 1 and loads(python, archive.extract(libraries[0], folder), facts)


def installed(python, package, module, version, facts):
    """Check whether this version of the package is installed with operators that fit."""
    query = 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))'
    if call([python, '-c', query, package]) != version:
        return False
    library = call([python, '-c', FIND_LIBRARY, module])
    return bool(library) and loads(python, library, facts)


def find_wheel(python, package, version, facts, say=print):
    """Find a prebuilt wheel that fits: in the cache folder, with pip, in pip's cache, or in mim's index.

    Returns:
        Path: The wheel, copied to the cache folder; ``None`` if none fits.
    """
    folder = cache_folder(package, version, facts)
    for wheel in folder.glob('*.whl'):
        if fits(python, wheel, facts):
            say(f'wheel from an earlier setup: {wheel}')
            return wheel
        wheel.unlink()
    pip = [python, '-m', 'pip', '--disable-pip-version-check']
    stem = package.replace('-', '_')
    tag = 'cp' + facts['python'].replace('.', '')
    with tempfile.TemporaryDirectory() as downloads:

        def download(name, *options, timeout=None):
            dest = Path(downloads, name)
            options = ('--quiet', '--no-deps', '--only-binary=:all:', '--dest', dest, *options)
            call([*pip, 'download', *options, f'{package}=={version}'], timeout)
            return list(dest.glob('*.whl'))

        def known_to_pip():
            return download('pip')

        def in_pips_cache():
            lines = (call([*pip, 'cache', 'list', '--format=abspath', stem]) or '').splitlines()
            return [Path(line) for line in lines if Path(line).name.startswith(f'{stem}-{version}-{tag}-')]

        def in_mims_index():
            index = call([python, '-W', 'ignore', '-c', FIND_INDEX])
            if not index or call([python, '-c', REACH, index, INDEX_SECONDS], timeout=2 * INDEX_SECONDS) is None:
                return []
            options = ('--no-index', '--find-links', index, '--timeout', INDEX_SECONDS, '--retries', 0)
            return download('index', *options, timeout=300)

        for where, candidates in (
            ('prebuilt wheel from pip', known_to_pip),
            ("wheel from pip's cache", in_pips_cache),
            ("wheel from mim's index", in_mims_index),
        ):
            for wheel in candidates():
                if fits(python, wheel, facts):
                    say(f'{where}: {wheel.name}')
                    return keep(wheel, folder)
                say(f'{where} skipped, because it does not fit torch {facts["torch"]}: {wheel.name}')
    return None


def keep(wheel, folder):
    """Copy a wheel to the cache folder atomically, and return the path of the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, suffix='.part')
    os.close(handle)
    shutil.copyfile(wheel, partial)
    os.chmod(partial, 0o644)
    os.replace(partial, folder / wheel.name)
    return folder / wheel.name


def available_memory():
    """Return the free memory in bytes. In a container, return at most the unused part of its memory limit."""
    with open('/proc/meminfo') as file:
        kib = dict(line.split()[:2] for line in file)
    sizes = [1024 * int(kib['MemAvailable:'])]
    # outside of a container, these files do not exist; without a limit, memory.max contains 'max'
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text()) for name in ('memory.max', 'memory.current'))
        statistics = dict(line.split() for line in (CGROUP / 'memory.stat').read_text().splitlines())
        sizes.append(limit - used + int(statistics['inactive_file']))  # the file cache is freed on demand
    return min(sizes)


def available_cores():
    """Return the number of CPU cores that this process may use. In a container, return at most its CPU quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, Path('/sys/fs/cgroup/cpu.max').read_text().split())
        cores = min(cores, max(1, round(quota / period)))
    return cores


def choose_jobs(cores, memory):
    """Return the number of files to compile at the same time: one per core if memory allows, at least one."""
    return max(1, min(cores, int(memory // JOB_MEMORY)))


def check_build(facts, folder):
    """Check compiler, headers, CUDA toolkit, memory and disk before a build starts.

    Raises:
        SetupError: If a requirement is missing. The message says how to install or free it.
    """
    compiler = shlex.split(os.environ.get('CXX') or 'c++')
    again = 'Then run the same command again.'
    if not shutil.which(compiler[0]):
        raise SetupError(
            f"mmcv's operators must be compiled, but there is no C++ compiler ({compiler[0]!r}). "
            f'Install one: `apt install g++` on Debian and Ubuntu, `dnf install gcc-c++` on Fedora. {again}'
        )
    probe = '#include <Python.h>\n#include <optional>\nstd::optional<int> number;\n'
    command = [*compiler, '-std=c++17', '-fsyntax-only', '-x', 'c++', '-I', facts['include'], '-']
    done = subprocess.run(command, input=probe, capture_output=True, text=True)
    if 'Python.h' in done.stderr:
        raise SetupError(
            f"mmcv's operators must be compiled, but the headers of Python {facts['python']} are missing "
            f'({facts["include"]}/Python.h). Install them: `apt install python{facts["python"]}-dev` on Debian and '
            f'Ubuntu, `dnf install python3-devel` on Fedora. {again}'
        )
    if done.returncode:
        raise SetupError(
            f'{compiler[0]!r} does not compile C++17, which torch needs; use g++ 9 or newer. Output:\n{done.stderr}'
        )
    if facts['gpu'] and not facts['toolkit']:
        raise SetupError(
            f"torch {facts['torch']} sees a GPU, so compiling mmcv's operators needs the CUDA toolkit (nvcc) of the "
            'version that torch was built for. Install the toolkit and set CUDA_HOME. To build for the CPU only, put '
            'CUDA_VISIBLE_DEVICES= before the command.'
        )
    memory = available_memory()
    if memory < JOB_MEMORY and 'MAX_JOBS' not in os.environ:
        raise SetupError(
            f"Compiling mmcv's operators needs {JOB_MEMORY / GIB:.1f} GiB of free memory, but only "
            f'{memory / GIB:.1f} GiB are free. Close programs or add swap. {again} To try anyway, put MAX_JOBS=1 '
            'before the command.'
        )
    check_disk(folder, BUILD_DISK, "compiling mmcv's operators")


def check_disk(folder, needed, purpose):
    """Raise a SetupError if fewer than ``needed`` bytes are free on the disk of ``folder``, which may not exist yet."""
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f'{purpose[0].upper()}{purpose[1:]} needs {needed / GIB:.1f} GiB of disk space, but only '
            f'{free / GIB:.1f} GiB are free in {folder}. Free some space, then run the same command again.'
        )


def fetch_source(python, package, version, folder):
    """Download and unpack the released source, unless an earlier run has done so.

    Returns:
        Path: Folder with setup.py. Compiled files stay in it until the build is complete.
    """
    source = folder / 'source'
    if source.is_dir():
        return source
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        options = ('--no-deps', '--no-build-isolation', f'--no-binary={package}', '--dest', temporary)
        command = [python, '-m', 'pip', '--disable-pip-version-check', 'download', '--quiet', *options]
        done = subprocess.run(
            [str(part) for part in (*command, f'{package}=={version}')], capture_output=True, text=True
        )
        archives = list(Path(temporary).glob('*.tar.gz'))
        if done.returncode or not archives:
            raise SetupError(f'The source of {package} {version} cannot be downloaded:\n{done.stderr.strip()}')
        with tarfile.open(archives[0]) as archive:
            archive.extractall(temporary, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        (setup,) = Path(temporary).glob('*/setup.py')
        setup.parent.rename(source)
    return source


class Build:
    """Background build of a wheel.

    Object files stay in the source folder until the wheel is complete, so an interrupted build resumes with the missing
    files. A lock keeps two builds from using the same folder at the same time: the second build waits.

    Args:
        python (Path): Interpreter of the environment.
        package (str): Name of the distribution.
        version (str): Version of the distribution.
        folder (Path): Folder of this build, see :func:`cache_folder`.
        facts (dict): Properties of the environment, see :func:`read_facts`.
    """

    def __init__(self, python, package, version, folder, facts):
        self.python = Path(python)
        self.package = package
        self.version = version
        self.folder = folder
        self.facts = facts
        self.source = folder / 'source'
        self.log = folder / 'build.log'
        self.jobs = int(os.environ.get('MAX_JOBS') or choose_jobs(available_cores(), available_memory()))
        self.process = None
        self.lock = None
        self.began = None
        self.latest = (0, 0.0)  # number of files compiled in this run, seconds from the start to the last file

    def start(self, say=print, show=lambda text: None):
        """Start the compiler. If another setup builds the same operators, wait for it first and show its progress."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / 'lock', 'w')
        if not self.locked():
            say(f'another setup is compiling the same operators ({self.folder}); waiting for it ...')
            while not self.locked():
                show(self.status())
                time.sleep(0.5)
        if self.wheel():
            return self
        fetch_source(self.python, self.package, self.version, self.folder)
        self.began = time.monotonic()
        # without debug info, compiling takes half as long
        flags = {name: f'{os.environ.get(name, "")} -g0'.strip() for name in ('CFLAGS', 'CXXFLAGS')}
        path = f'{self.python.parent}{os.pathsep}{os.environ.get("PATH", "")}'  # ninja is in this folder
        env = dict(os.environ, MMCV_WITH_OPS='1', PATH=path, PYTHONUNBUFFERED='1', MAX_JOBS=str(self.jobs), **flags)
        shutil.rmtree(self.source / 'dist', ignore_errors=True)
        with open(self.log, 'wb') as log:
            # In a session of its own, the build does not receive Ctrl-C, and only stop() ends it. The compiler inherits
            # the lock, so the lock holds while a compiler runs, even if this process is killed.
            self.process = subprocess.Popen(
                [str(self.python), '-W', 'ignore', 'setup.py', 'bdist_wheel', '--dist-dir', 'dist'],
                cwd=self.source,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
        return self

    def locked(self):
        """Try to take the lock; return whether it succeeded."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def wheel(self):
        """Return the finished wheel in the cache folder, or ``None``."""
        return next(self.folder.glob('*.whl'), None)

    def running(self):
        return self.process is not None and self.process.poll() is None

    def compiling(self):
        """Check whether setup.py has started the compiler, so that it no longer reads the environment."""
        return not self.running() or self.step()[1] > 0

    def step(self):
        """Return how many files this run has compiled, and how many files it compiles in total."""
        steps = NINJA_STEP.findall(self.log.read_bytes()) if self.log.exists() else []
        return tuple(map(int, steps[-1])) if steps else (0, 0)

    def status(self):
        """Describe in one line the current file, the number of files and the time left."""
        done, todo = self.step()
        total = max(todo, count_files(self.source))
        if not todo:
            return f'operators: starting, {total} files' if total else 'operators: starting'
        number = total - todo + done
        if number == total:
            return f'operators: {total} files compiled, linking'
        self.began = self.began or time.monotonic()
        elapsed = time.monotonic() - self.began
        if done > self.latest[0]:
            self.latest = (done, elapsed)
        line = f'operators: file {number + 1} of {total}'
        done, seconds = self.latest
        if done >= 2 * self.jobs:  # with fewer files, an estimate would be too inaccurate
            line += f', {minutes_left((seconds * todo / done - elapsed) / 60)}'
        return line

    def finish(self):
        """Wait for the end of the build, and move the wheel to the cache folder.

        Returns:
            Path: The wheel in the cache folder.

        Raises:
            SetupError: If the build failed. The message contains the last lines of the compiler output and advice.
        """
        if self.process is not None:
            code = self.process.wait()
            wheels = list((self.source / 'dist').glob('*.whl'))
            if code or not wheels:
                self.close()
                raise SetupError(explain_failure(self.log, self.package, self.facts))
            if not fits(self.python, wheels[0], self.facts):
                self.close()
                raise SetupError(
                    f'The compiled operators do not load with torch {self.facts["torch"]}; see the log {self.log}.'
                )
            keep(wheels[0], self.folder)
            shutil.rmtree(self.source)
        self.close()
        return self.wheel()

    def stop(self):
        """Stop the compiler and keep the compiled files."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)  # ninja removes incomplete files
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.close()

    def close(self):
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def count_files(source):
    """Return the total number of files that ninja compiles; 0 before build.ninja exists."""
    return sum(path.read_text().count('\nbuild ') for path in source.glob('build/temp*/build.ninja'))


def minutes_left(minutes):
    """Describe the remaining time in words."""
    if minutes < 1:
        return 'less than a minute left'
    return f'about {round(minutes)} minute{"s" if round(minutes) > 1 else ""} left'


def explain_failure(log, package, facts, lines=20, width=200):
    """Return the last lines of the compiler output, followed by advice on the failure."""
    text = log.read_text(errors='replace') if log.exists() else ''
    # leave out setup.py's traceback, which follows ninja's output, and compile commands of thousands of characters
    errors = text.split('\nFAILED: ')[1].split('\nninja: ')[0] if '\nFAILED: ' in text else text
    last = [line[:width] for line in errors.splitlines() if line.strip() and not re.search(r'\s-c\s.*\s-o\s', line)]
    fixes = (
        (r'Killed signal|out of memory|cannot allocate', 'Not enough memory: run the command again with MAX_JOBS=1.'),
        (r'No space left on device', f'The disk is full: free space in {log.parent} and in the temporary folder.'),
        (r'Python\.h: No such file', f'Install the headers of Python: `apt install python{facts["python"]}-dev`.'),
        (
            r'(error|need)[^\n]*C\+\+(17|20|23)|-std=(c|gnu)\+\+2|error[^\n]*(concept|std::(span|numbers|remove_cvref))',
            f'torch {facts["torch"]} needs a newer C++ standard than {package} uses, so they do not fit: install the '
            'version of torch in requirements/constraints*.txt.',
        ),
        (
            r'CUDA version|nvcc',
            'The CUDA toolkit does not fit torch. To build for the CPU, put CUDA_VISIBLE_DEVICES= before the command.',
        ),
    )
    found = [fix for pattern, fix in fixes if re.search(pattern, '\n'.join(last), re.IGNORECASE)]
    tested = f'{package} was tested with the torch version in requirements/constraints*.txt; install this version.'
    advice = found[0] if found else tested
    return '\n'.join(
        [
            f"Compiling mmcv's operators failed ({package}, torch {facts['torch']}). The last lines:",
            *(f'    {line}' for line in last[-lines:]),
            advice,
            f'Compiled files are kept. Full log: {log}',
        ]
    )
