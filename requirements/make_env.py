#!/usr/bin/env python3
"""Create a virtual environment with everything that mmdiffkd needs: ``make env`` and ``make env-openmmlab``.

The script runs with the system's Python, before anything is installed. To resume after an interruption, run the same
command again.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from operators import (
    GIB,
    Build,
    SetupError,
    cache_folder,
    call,
    check_build,
    check_disk,
    find_wheel,
    installed,
    read_facts,
)

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 12))
ENVIRONMENT_DISK = 9 * GIB  # 6 GiB for the environment, 3 GiB for pip's downloads
FAMILIES = {
    'onedl': dict(
        mmcv='onedl-mmcv',
        mim='onedl-mim',
        requirements=('runtime', 'mminstall', 'docs', 'tests'),
        constraints='constraints.txt',
        aliases={'mmdet': 'onedl-mmdetection'},
    ),
    'openmmlab': dict(
        mmcv='mmcv',
        mim='openmim',
        requirements=('runtime', 'openmmlab', 'tests'),
        constraints='constraints-openmmlab.txt',
        aliases={},
    ),
}
PIP_ACTIVITY = re.compile(
    r'^\s*(Collecting|Downloading|Using cached|Building wheel|Installing collected packages)(.*)$'
)
# Script that prints the site-packages folder, and the version and summary of an installed distribution.
DISTRIBUTION = """
import importlib.metadata, sys, sysconfig
found = importlib.metadata.distribution(sys.argv[1])
print(sysconfig.get_path('purelib'), found.version, found.metadata['Summary'], sep='\\n')
"""


class Display:
    """Progress display: permanent lines, and below them a status line.

    On a terminal, the status line is rewritten in place. In a log file, the current status is written once per minute.
    """

    def __init__(self, stream=None, interval=60):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.interval = interval
        self.since = time.monotonic()

    def step(self, text):
        """Write a permanent line."""
        print(f'\r\033[K{text}' if self.live else text, file=self.stream, flush=True)
        self.since = time.monotonic()

    def detail(self, text):
        """Write a permanent, indented line below the line of a step."""
        self.step(f'      {text}')

    def now(self, text):
        """Show the current status in the status line."""
        if self.live:
            width = shutil.get_terminal_size().columns - 7
            print(f'\r\033[K      {text[:width]}', end='', file=self.stream, flush=True)
        elif time.monotonic() - self.since >= self.interval:
            self.detail(text)


class Environment:
    """A virtual environment that pip installs packages into."""

    def __init__(self, folder, family, display):
        self.folder = folder
        self.python = folder / 'bin' / 'python'
        self.family = FAMILIES[family]
        self.display = display
        self.constraints = ROOT / 'requirements' / self.family['constraints']
        self.log = folder / 'make_env.log'
        self.build = None

    def create(self):
        """Create the environment, unless it exists and pip runs in it."""
        if self.python.exists() and call([self.python, '-m', 'pip', '--version']):
            return
        done = subprocess.run(
            [sys.executable, '-m', 'venv', '--clear', str(self.folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise SetupError(
                f'{done.stdout.strip()}\n{sys.executable} cannot create a virtual environment. On Debian and Ubuntu, '
                'install `python3-venv`; elsewhere set PYTHON to a complete Python.'
            )

    def version(self, package):
        """Return the version of a package in the constraints file."""
        match = re.search(rf'^{re.escape(package)}==(\S+)', self.constraints.read_text(), re.MULTILINE)
        if not match:
            raise SetupError(f'{self.constraints} has no version of {package} (`{package}==...`).')
        return match.group(1)

    def requirements(self, *names, without=''):
        """Return the requirements in the named files, leaving out the package ``without``."""
        lines = [line for name in names for line in (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()]
        found = [line.split('#')[0].strip() for line in lines]
        return [line for line in found if line and re.match(r'[\w.-]+', line).group() != without]

    def install(self, *what):
        """Install with pip, and show the progress of pip and of a running build."""
        command = [self.python, '-m', 'pip', '--disable-pip-version-check', 'install', '--progress-bar', 'off']
        command += ['--no-build-isolation', '--constraint', self.constraints, *what]
        began = time.monotonic()
        with open(self.log, 'a+') as log:
            log.write(f'\n$ {shlex.join(map(str, command))}\n')
            log.flush()
            start = log.seek(0, os.SEEK_END)
            process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            try:
                while process.poll() is None:
                    self.show(pip_activity(self.output(start)), began)
                    time.sleep(0.5)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        if process.returncode:
            last = '\n'.join(f'    {line[:200]}' for line in self.output(start).splitlines()[-15:])
            raise SetupError(f'pip failed:\n{last}\nFull log: {self.log}')

    def output(self, start):
        with open(self.log, errors='replace') as log:
            log.seek(start)
            return log.read()

    def show(self, activity, began):
        elapsed = time.monotonic() - began
        text = f'{activity}, {elapsed // 60:.0f}:{elapsed % 60:02.0f}'
        if self.build is not None and self.build.running():
            text = f'{self.build.status()}; {text}'
        self.display.now(text)

    def wait_for(self, done, activity):
        """Wait until ``done()`` is true, and show ``activity`` and the progress of the build."""
        began = time.monotonic()
        while not done():
            self.show(activity, began)
            time.sleep(0.5)


def pip_activity(output):
    """Summarize pip's current activity in a few words."""
    for line in reversed(output.splitlines()):
        match = PIP_ACTIVITY.match(line)
        if match:
            verb, rest = match.groups()
            if verb == 'Installing collected packages':
                return f'installing {rest.count(",") + 1} packages'
            return f'{verb.lower()} {" ".join(rest.split()[:4])}'
    return 'pip is resolving packages'


def add_alias(python, name, package):
    """Register an installed distribution under a second name, so that mim finds it. Only metadata are written.

    onedl-mim accepts any installed distribution with the given name. If its metadata list no files, onedl-mim looks for
    the files in the folder with that name. pip lists, checks, replaces and uninstalls the alias like any distribution.

    Returns:
        str: Version of the alias; ``None`` if a real distribution of this name is installed.
    """
    summary = f'Alias of {package}, by which mim finds it'
    there = call([python, '-c', DISTRIBUTION, name])
    if there and there.splitlines()[2] != summary:
        return None
    site_packages, version, _ = call([python, '-c', DISTRIBUTION, package]).splitlines()
    for old in Path(site_packages).glob(f'{name}-*.egg-info'):
        shutil.rmtree(old)
    # Do not write a list of files or top_level.txt: with them, pip would uninstall the package together with the alias.
    partial = Path(site_packages, f'.{name}.part')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    partial.joinpath('PKG-INFO').write_text(
        f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n'
    )
    partial.joinpath('requires.txt').write_text(f'{package}\n')
    partial.rename(Path(site_packages, f'{name}-{version}.egg-info'))
    return version


def provide_operators(env, display):
    """Find a wheel with mmcv's operators, or start to compile them in the background, as ``env.build``.

    Returns:
        Path: The wheel to install; ``None`` if the operators are already installed or being compiled.
    """
    package = env.family['mmcv']
    version = env.version(package)
    facts = read_facts(env.python)
    if installed(env.python, package, 'mmcv', version, facts):
        display.detail('already installed')
        return None
    wheel = find_wheel(env.python, package, version, facts, display.detail)
    if wheel:
        return wheel
    folder = cache_folder(package, version, facts)
    check_build(facts, folder)
    env.build = Build(env.python, package, version, folder, facts)
    display.detail(
        f'no prebuilt wheel fits: compiling {package} {version} for torch {facts["torch"]}, {env.build.jobs} files at '
        'a time; 8 - 15 minutes on two idle cores'
    )
    display.detail(f'log: {env.build.log}')
    env.build.start(display.detail, display.now)
    # setup.py reads the environment until it starts to compile; later steps change the environment, so wait
    env.wait_for(env.build.compiling, 'waiting for the first compiled file')
    return None


def make(env, display):
    """Run all steps of the setup. A step that an earlier run has finished takes little time."""
    if not env.python.exists():
        check_disk(env.folder, ENVIRONMENT_DISK, 'the environment')
    env.create()
    display.step('[1/6] torch and torchvision: 1 - 5 minutes, mostly downloads ...')
    env.install('torch', 'torchvision')
    display.step('[2/6] build tools and mim: less than a minute ...')
    env.install(*env.requirements('build'))
    env.install(env.family['mim'])
    display.step("[3/6] mmcv's operators: a prebuilt wheel takes seconds; otherwise compiled in the background ...")
    wheel = provide_operators(env, display)
    display.step('[4/6] the other OpenMMLab packages and the test tools: 1 - 3 minutes ...')
    env.install(*env.requirements(*env.family['requirements'], without=env.family['mmcv']))
    if env.build is not None:
        display.step("[5/6] mmcv's operators: waiting for the compiler ...")
        env.wait_for(lambda: not env.build.running(), 'all other packages are installed')
        wheel = env.build.finish()
        display.detail(f'cached for other environments: {wheel}')
    else:
        display.step("[5/6] mmcv's operators: nothing to compile")
    if wheel:  # reinstall, because the same version may be installed with operators that do not fit torch
        env.install('--force-reinstall', '--no-deps', wheel)
    env.install(wheel or env.family['mmcv'])  # also installs the dependencies
    display.step('[6/6] mmdiffkd and an import check of all packages: less than a minute ...')
    env.install('--no-deps', '--editable', ROOT)
    for name, package in env.family['aliases'].items():
        add_alias(env.python, name, package)
    modules = 'import mmcv.ops, mmdet, mmseg, mmpretrain, mmdiffkd'
    done = subprocess.run([str(env.python), '-W', 'ignore', '-c', modules], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SetupError(f'The environment is complete, but `{modules}` fails:\n{done.stderr.strip()}')
    (env.folder / '.ready').touch()


def main():
    parser = argparse.ArgumentParser(description='Create a virtual environment with everything that mmdiffkd needs.')
    parser.add_argument('folder', type=Path, help='folder of the virtual environment')
    parser.add_argument('--family', choices=FAMILIES, default='onedl', help='maintained (onedl) or original packages')
    args = parser.parse_args()
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        version = '.'.join(map(str, sys.version_info[:3]))
        sys.exit(f'Python 3.11 or 3.12 is needed, but this is {version}. Set PYTHON, for example PYTHON=python3.11.')
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit('Terminated. Run the same command again to resume.'))
    display = Display()
    env = Environment(args.folder.absolute(), args.family, display)
    began = time.monotonic()
    display.step(
        f'Creating the environment in {args.folder}. On two idle cores, this takes up to 5 minutes, or up to 18 '
        "minutes if mmcv's operators must be compiled."
    )
    try:
        make(env, display)
    except SetupError as error:
        display.step('')
        sys.exit(f'{error}')
    except KeyboardInterrupt:
        display.step('')
        sys.exit('Interrupted. Run the same command again to resume.')
    finally:
        if env.build is not None:
            with contextlib.suppress(KeyboardInterrupt):
                env.build.stop()
    display.step(f'Ready after {(time.monotonic() - began) / 60:.1f} minutes.')
    display.step(f'To activate the environment: source {args.folder}/bin/activate')


if __name__ == '__main__':
    main()
