#!/usr/bin/env python3
"""Install mmdiffkd's packages on a machine that has its own Python and torch, but no network.

``pack`` downloads the packages on a machine with a network. ``install`` installs them on the other machine into a
folder for ``PYTHONPATH``, and compiles mmcv's operators for the torch and the GPU of that machine.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from operators import Build, SetupError, cache_folder, call, check_build, fits, installed, read_facts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pages import machine, write_page  # noqa: E402

MMCV = 'onedl-mmcv'
GLIBC = (34, 31, 28, 27, 24, 17)  # minor versions of glibc 2; pip does not infer that older ones run, too
IMPORTS = 'import mmcv.ops, mmdet, mmseg, mmpretrain, mmdiffkd.models'
STEPS = ('packages', "mmcv's operators", 'imports')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['pack', 'install'])
    parser.add_argument(
        'folder', type=Path, nargs='?', help='folder of the packages; without it, install only checks the imports'
    )
    parser.add_argument('--python', default='3.12', help='pack: Python version of the other machine (default 3.12)')
    parser.add_argument(
        '--also', nargs='+', default=[], metavar='NAME', help='pack: more packages, such as numpy==2.2.6'
    )
    parser.add_argument('--site', type=Path, help='install: folder to install to, for PYTHONPATH')
    parser.add_argument('--page', type=Path, help='install: write a table of the steps to this .md file')
    args = parser.parse_args()
    if args.command == 'pack' and args.folder is None:
        parser.error('pack needs a folder.')
    if args.command == 'install' and None in (args.site, args.page):
        parser.error('install needs --site and --page.')
    return args


def pack(folder, python, also):
    """Download wheels for x86-64 Linux and this version of Python, and mmcv's source."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.split('#')[0].strip() for line in (ROOT / 'requirements' / 'offline.txt').read_text().splitlines()]
    constraints = ROOT / 'requirements' / 'constraints.txt'
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    common = ['--quiet', '--no-deps', '--constraint', constraints]
    platforms = [part for number in GLIBC for part in ('--platform', f'manylinux_2_{number}_x86_64')]
    platforms += ['--platform', 'manylinux2014_x86_64']
    binary = ['--only-binary=:all:', '--implementation', 'cp', '--python-version', python, *platforms]
    for name in [*filter(None, lines), *also]:
        wheel = [*pip, 'wheel', *common, '--no-build-isolation', '--wheel-dir', folder, name]
        if call([*pip, 'download', *common, *binary, '--dest', folder, name]) is None and call(wheel) is None:
            raise SetupError(f'{name} has no wheel for Python {python} and cannot be built on this machine.')
    source = ['--no-build-isolation', f'--no-binary={MMCV}', '--dest', folder, MMCV]
    if call([*pip, 'download', *common, *source]) is None:
        raise SetupError(f'The source of {MMCV} cannot be downloaded.')
    for file in folder.glob('*.whl'):
        if not re.search(rf'-(py[23.py]*-none|cp{python.replace(".", "")}-\w+|(cp3\d+|py3)-(abi3|none))-', file.name):
            raise SetupError(f'{file} does not run with Python {python}; leave it out, or name another version of it.')
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f'{folder}: {len(list(folder.iterdir()))} packages, {size / 2**20:.0f} MiB')


class Installation:
    """Installation of packed packages into a folder, and the page with the results of its steps."""

    def __init__(self, folder, site, page):
        self.folder, self.site, self.page = folder, site.absolute(), page
        self.python = Path(sys.executable)
        self.results = {step: ('not run', '') for step in STEPS}
        path = os.environ.get('PYTHONPATH')
        os.environ['PYTHONPATH'] = os.pathsep.join([str(self.site), str(ROOT), *([path] if path else [])])
        # the packages install ninja into this folder
        os.environ['PATH'] = f'{self.site / "bin"}{os.pathsep}{os.environ.get("PATH", "")}'
        self.write()

    def write(self):
        """Write the page with the results so far."""
        import torch

        rows = [dict(step=step, result=result, seconds=seconds) for step, (result, seconds) in self.results.items()]
        where = machine('cuda' if torch.cuda.is_available() else 'cpu', os.cpu_count())
        text = f"Packages of {self.folder or 'the environment'}; mmcv's operators compiled for this torch and GPU."
        command = ' '.join(['python', *map(str, sys.argv)])
        write_page(self.page, 'Environment', text, command, where, rows)

    @contextlib.contextmanager
    def step(self, name):
        """Time a step. The code in the ``with`` block stores the result in ``self.results``."""
        print(f'{name} ...', flush=True)
        start = time.monotonic()
        self.results[name] = ('started, not ended', '')
        self.write()
        try:
            yield
        except SetupError as error:
            self.results[name] = (f'failed: {str(error).splitlines()[-1]}', '')
            raise
        finally:
            self.results[name] = (self.results[name][0], f'{time.monotonic() - start:.0f}')
            self.write()

    def run(self):
        if self.folder is not None:
            with self.step('packages'):
                wheels = [file for file in self.folder.glob('*.whl') if not file.name.startswith('onedl_mmcv-')]
                if not wheels:
                    raise SetupError(f'{self.folder} has no wheels; run pack on a machine with a network.')
                self.pip(*wheels)
                self.results['packages'] = (f'{len(wheels)} wheels installed', '')
            with self.step("mmcv's operators"):
                self.results["mmcv's operators"] = (self.provide_operators(), '')
        with self.step('imports'):
            done = subprocess.run([str(self.python), '-W', 'ignore', '-c', IMPORTS], capture_output=True, text=True)
            if done.returncode:
                raise SetupError(f'`{IMPORTS}` fails:\n{done.stderr.strip()}')
            self.results['imports'] = ('all packages', '')

    def pip(self, *wheels):
        """Install wheels into the folder, without their dependencies."""
        options = ['--quiet', '--no-index', '--no-deps', '--no-compile', '--upgrade', '--target', self.site]
        command = [self.python, '-m', 'pip', '--disable-pip-version-check', 'install', *options, *wheels]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SetupError(f'pip failed:\n{done.stdout.strip()}')

    def provide_operators(self):
        """Install a wheel of mmcv whose operators fit torch: a packed or cached wheel, or else compile the source."""
        source = next(self.folder.glob('onedl_mmcv-*.tar.gz'), None)
        packed = list(self.folder.glob('onedl_mmcv-*.whl'))
        names = [file.name for file in [*packed, *([source] if source else [])]]
        if not names:
            raise SetupError(f'{self.folder} has neither a wheel nor the source of {MMCV}; run pack again.')
        facts = read_facts(self.python)
        version = re.match(r'onedl_mmcv-([\w.]+?)(-|\.tar)', names[0]).group(1)
        if installed(self.python, MMCV, 'mmcv', version, facts):
            return f'{MMCV} {version} was already installed'
        cache = cache_folder(MMCV, version, facts)
        for wheel in [*packed, *cache.glob('*.whl')]:
            if fits(self.python, wheel, facts):
                self.pip(wheel)
                return f'wheel {wheel.name}'
        if source is None:
            raise SetupError(f'{names[0]} does not fit torch {facts["torch"]}, and there is no source; run pack again.')
        check_build(facts, cache)
        unpack(source, cache / 'source')
        build = Build(self.python, MMCV, version, cache, facts)
        try:
            build.start()
            while build.running():
                time.sleep(10)
                print(build.status(), flush=True)
            wheel = build.finish()
        finally:
            build.stop()
        self.pip(wheel)
        shutil.copy(wheel, self.page.parent)  # put this wheel into the folder of the packages to avoid compiling
        return f'compiled, {build.jobs} files at a time; {wheel.name} is next to this page'


def unpack(archive, target):
    """Unpack the source of a package, unless an earlier run has done so."""
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, tarfile.open(archive) as file:
        file.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
        (setup,) = Path(folder).glob('*/setup.py')
        setup.parent.rename(target)


def main():
    args = parse_args()
    try:
        if args.command == 'pack':
            pack(args.folder, args.python, args.also)
        else:
            Installation(args.folder, args.site, args.page).run()
    except SetupError as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main()
