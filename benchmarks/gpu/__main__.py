"""Run all tests and benchmarks that need a GPU, on a machine that is available for a short time only.

Every stage consists of parts. A part is a process with a time limit. It writes a table to the output folder when it
ends. If a part fails or reaches its time limit, its table says so. The page index.md lists all parts. The time limits
of the parts add up to less than 8 minutes for each stage, and to less than 22 minutes for all stages.

Stages:
  setup      check the environment; with --packages, install it and compile mmcv's operators
  tests      tests marked gpu: mixed precision, compilation, memory formats, DDP with NCCL, activation checkpointing
  neck       time and peak memory of the diffusion module, for images of 800x1344
  iteration  time and peak memory of a distilled iteration of RetinaNet R101 -> R50, for images of 800x1344
  deeppcb    training on DeepPCB with one seed: the student alone, and the student with each of two presets
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from benchmarks.pages import machine, markdown, write_page

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 20  # seconds that a part gets after its time limit, to write the results that it has
SMOKE_FACTOR = 6  # --smoke multiplies the time limits by this, because importing packages takes longer on a busy CPU
LINES = 5  # the page of a failed part shows this many lines from the end of its log


@dataclass
class Part:
    """A process of a stage.

    Args:
        stage (str): Name of the stage.
        name (str): Name of the page and the log.
        title (str): Title of the page that is written if the part has not written its own page.
        seconds (int): Time limit.
        words (list[str]): Command line arguments for Python.
    """

    stage: str
    name: str
    title: str
    seconds: int
    words: List[str]


def make_parts(args, out: Path) -> List[Part]:
    """Return the parts of all stages. With ``--smoke``, the inputs are tiny."""
    neck = ['-m', 'benchmarks.neck', '--levels', 'coco']
    iteration = ['-m', 'benchmarks.iteration', 'configs/diffkd_retinanet_r101_r50.py', '--size', '800', '1344']
    deeppcb = ['-m', 'benchmarks.gpu.comparison', '--work-dir', str(out / 'deeppcb')]
    if args.smoke:
        tiny = ['--rounds', '2', '--threads', '1']
        neck[-1:] = ['tiny', '--channels', '8', *tiny]
        # small, because CPUs without bfloat16 instructions take minutes for a ResNet-50
        config = 'configs/shapes/diffkd_retinanet-r18-half_retinanet-r18-eighth_6e_shapes.py'
        iteration[2:] = [config, '--size', '64', '64']
        iteration += tiny
        deeppcb += ['--smoke']
    else:
        deeppcb += ['--data', str(args.data), '--teacher', str(args.teacher)]
    iteration += ['--batch', '2']
    packages = [str(args.packages)] if args.packages else []
    setup = ['requirements/offline_env.py', 'install', *packages, '--site', str(args.site)]
    tests = ['-m', 'pytest', '-m', 'gpu', '-p', 'benchmarks.gpu.pytest_page', '--gpu-device', args.device]
    factor = SMOKE_FACTOR if args.smoke else 1
    tests += ['-o', f'timeout={120 * factor}', 'tests/test_gpu.py']
    module = 'Cost of the diffusion module'
    parts = [
        ('setup', 'setup', 'Environment', 450, setup),
        ('tests', 'tests', 'Tests on a GPU', 180, tests),
        ('neck', 'neck', module, 50, [*neck, '--checkpoint']),
        ('neck', 'neck-bf16', f'{module} in bfloat16', 40, [*neck, '--checkpoint', '--bf16']),
        ('neck', 'neck-compile', f'{module}, compiled', 80, [*neck, '--compile', '--bf16']),
        ('iteration', 'iteration', 'Cost of an iteration', 60, iteration),
        ('iteration', 'iteration-bf16', 'Cost of an iteration in bfloat16', 50, [*iteration, '--bf16']),
        ('deeppcb', 'deeppcb', 'DeepPCB with one seed', 400, deeppcb),
    ]
    return [
        Part(stage, name, title, seconds * factor, [*words, '--page', str(out / f'{name}.md')])
        for stage, name, title, seconds, words in parts
    ]


STAGES = ('setup', 'tests', 'neck', 'iteration', 'deeppcb')


def parse_args():
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.gpu', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('stages', nargs='*', metavar='STAGE', help=f'stages to run: {", ".join(STAGES)} (default: all)')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/gpu'), help='folder for the tables (default %(default)s)'
    )
    parser.add_argument(
        '--packages', type=Path, help='folder of packages to install, from requirements/offline_env.py pack'
    )
    parser.add_argument(
        '--site', type=Path, default=ROOT / 'build' / 'gpu_site', help='folder to install to (default build/gpu_site)'
    )
    parser.add_argument(
        '--data',
        type=Path,
        default=Path(os.environ.get('MMDIFFKD_DEEPPCB', 'data/deeppcb_coco320')),
        help='folder of DeepPCB (default: MMDIFFKD_DEEPPCB, or data/deeppcb_coco320)',
    )
    parser.add_argument(
        '--teacher',
        type=Path,
        default=Path('data/deeppcb_teacher.pth'),
        help='weights of benchmarks/accuracy/configs/deeppcb_teacher.py (default %(default)s)',
    )
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help='device (default cuda)')
    parser.add_argument('--smoke', action='store_true', help='only check that every part runs, on tiny inputs')
    args = parser.parse_args()
    for stage in args.stages:
        if stage not in STAGES:
            parser.error(f"There is no stage '{stage}'; choose from {', '.join(STAGES)}.")
    if args.packages is not None and not args.packages.is_dir():
        parser.error(f'--packages {args.packages} is not a folder.')
    return args


class Kit:
    """Runs parts in order, and writes the index after each part.

    Args:
        out (Path): Folder of the tables.
        device (str): ``'cuda'`` or ``'cpu'``.
        site (Path): Folder of installed packages, for ``PYTHONPATH``.
    """

    def __init__(self, out: Path, device: str, site: Path):
        self.out, self.device = out, device
        paths = [site, ROOT, *filter(None, [os.environ.get('PYTHONPATH')])]
        self.env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, paths)), PYTHONUNBUFFERED='1')
        if device == 'cpu':
            self.env['CUDA_VISIBLE_DEVICES'] = ''
        self.state_file = out / 'index.json'  # keeps the results of parts that earlier calls ran
        self.rows = json.loads(self.state_file.read_text('utf-8')) if self.state_file.exists() else {}
        (out / 'logs').mkdir(parents=True, exist_ok=True)

    def run(self, parts: List[Part]) -> bool:
        """Run the parts. Return whether all have succeeded."""
        for part in parts:
            self.record(part, 'not run', 0)
        for part in parts:
            print(f'{part.name}: at most {part.seconds} s ...', flush=True)
            self.record(part, 'started, not ended', 0)
            (self.out / f'{part.name}.md').unlink(missing_ok=True)
            start = time.monotonic()
            code = self.execute(part)
            seconds = time.monotonic() - start
            result = 'done'
            if code is None:
                result = f'time over after {part.seconds} s'
            elif code:
                result = f'failed (exit code {code})'
            if not (self.out / f'{part.name}.md').exists():
                result = 'no table' if result == 'done' else result
                self.write_failure(part, result)
            self.record(part, result, seconds)
            print(f'{part.name}: {result}, {seconds:.0f} s', flush=True)
        return all(self.rows[part.name]['result'] == 'done' for part in parts)

    def execute(self, part: Part) -> Optional[int]:
        """Run a part. Return its exit code, or None if it reached its time limit."""
        command = [sys.executable, *part.words]
        with self.log(part).open('wb') as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(part.seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                stop(process)

    def log(self, part: Part) -> Path:
        return self.out / 'logs' / f'{part.name}.log'

    def record(self, part: Part, result: str, seconds: float) -> None:
        """Store the result of a part, and write the index."""
        self.rows[part.name] = dict(
            stage=part.stage,
            table=f'[{part.name}]({part.name}.md)',
            result=result,
            seconds=f'{seconds:.0f}',
            limit=part.seconds,
        )
        self.state_file.write_text(json.dumps(self.rows, indent=1), 'utf-8')
        table = markdown(list(self.rows.values()))
        (self.out / 'index.md').write_text(f'# Results\n\n{table}\n', 'utf-8')

    def write_failure(self, part: Part, result: str) -> None:
        """Write a page with the result and the end of the log, for a part that has not written its own page."""
        lines = self.log(part).read_text('utf-8', errors='replace').splitlines()[-LINES:]
        rows = [dict(result=result)]
        text = 'There is no result. The log ends with:\n\n' + '\n'.join(f'    {line[:200]}' for line in lines or ['-'])
        write_page(
            self.out / f'{part.name}.md', part.title, text, shlex.join(['python', *part.words]), self.where(), rows
        )

    def where(self) -> dict:
        try:
            return machine(self.device, os.cpu_count())
        except (ImportError, RuntimeError, AssertionError) as error:  # no torch, or no GPU
            return dict(machine='unknown machine', versions=f'Python {sys.version.split()[0]}, {error}')


def stop(process: subprocess.Popen) -> None:
    """End a process and its children. They get ``GRACE`` seconds to write the results that they have."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            if process.poll() is None or number == signal.SIGKILL:
                os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def select(parts: List[Part], stages: List[str]) -> Tuple[List[Part], int]:
    """Return the parts of the given stages (of all stages if none is given), and the sum of their limits in seconds."""
    chosen = [part for part in parts if not stages or part.stage in stages]
    return chosen, sum(part.seconds for part in chosen)


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('Terminated. The tables have the results so far.'))
    out = args.out.absolute()
    for name in ('packages', 'site', 'data', 'teacher'):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).absolute())
    parts, seconds = select(make_parts(args, out), args.stages)
    print(f'{len(parts)} parts, at most {seconds / 60:.1f} minutes; tables in {out}', flush=True)
    done = Kit(out, args.device, args.site).run(parts)
    print((out / 'index.md').read_text('utf-8'))
    sys.exit(0 if done else 1)


if __name__ == '__main__':
    main()
