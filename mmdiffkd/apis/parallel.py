"""Run trainings in parallel."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, TextIO, Union

import torch
from mmengine.config import Config
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmdiffkd.cli import shorten_path

# One thread per job: if jobs share cores, OpenMP threads wait for each other ten times longer than they compute.
ONE_THREAD = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'), '1')
TAIL = 25  # lines to show from the log of a failed job
POLL, REFRESH = 0.1, 0.5  # seconds between checks of the jobs, and between updates of the progress bars
GRACE = 5.0  # seconds to wait for jobs to end after each signal
# STEP and ETA match lines of mmengine's log, such as 'Epoch(train)  [3][25/75] ... eta: 0:01:20',
# 'Iter(train) [  50/1500] ...' and 'Epoch(val) [3][13/13]'
STEP = re.compile(
    r' (?:Epoch|Iter)\((?P<mode>train|val|test)\) *(?:\[ *(?P<epoch>\d+)\])?\[ *(?P<step>\d+)/(?P<steps>\d+)\]'
)
ETA = re.compile(r' eta: (?:(\d+) days?, )?(\d+):(\d+):(\d+)')


@dataclass
class Job:
    """A command to run in parallel with others, usually a training.

    Args:
        name (str): Name of the job in the progress display.
        command (list[str] or Callable): The command, or a function without arguments that returns it. The function is
            called when the job starts, so it can use the results of earlier jobs.
        log (Path): File for the output of the command; overwritten.
        work_dir (Path, optional): Work dir of a training. The progress display reads the number of epochs from the
            config in it. Defaults to None.
        metric (str, optional): Key of the metric to show, as in the log (``'coco/bbox_mAP'``). Defaults to None.
        after (list[str]): Names of jobs that must succeed before this job starts. Defaults to ``()``.
    """

    name: str
    command: Union[Sequence[str], Callable[[], Sequence[str]]]
    log: Path
    work_dir: Optional[Path] = None
    metric: Optional[str] = None
    after: Sequence[str] = ()


@dataclass
class JobResult:
    """Result of a job.

    Attributes:
        name (str): Name of the job.
        returncode (int, optional): Exit code of the process: negative if a signal ended it, None if the job was not
            started because a required job failed.
        seconds (float): Wall time from start to end.
        log (Path): File with the output.
    """

    name: str
    returncode: Optional[int]
    seconds: float
    log: Path

    @property
    def ok(self) -> bool:
        return self.returncode == 0


def available_cores() -> int:
    """Return the number of cores that this process may use: its affinity mask, limited by its cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text('utf-8').split()
    except (OSError, ValueError):
        return cores
    return cores if quota == 'max' else max(1, min(cores, round(int(quota) / int(period))))


def available_gpus() -> List[str]:
    """Return the GPUs that this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    count, visible = torch.cuda.device_count(), os.environ.get('CUDA_VISIBLE_DEVICES')
    return [str(index) for index in range(count)] if visible is None else visible.split(',')[:count]


def run_parallel(
    jobs: Sequence[Job],
    workers: Optional[int] = None,
    on_done: Optional[Callable[[JobResult], None]] = None,
    file: Optional[TextIO] = None,
    interval: float = 20.0,
    gpus: Sequence[str] = (),
) -> List[JobResult]:
    """Run commands in parallel, with one CPU thread each, and show their progress.

    On a terminal, each job has a line with a progress bar. In a file or a pipe, each running job prints a plain line
    with the time of day every ``interval`` seconds and for every new metric. A failed job does not stop the others; the
    end of its log is shown. Ctrl-C, SIGTERM and a closed terminal end all running jobs and their subprocesses before
    this function raises.

    Args:
        jobs (list[Job]): Jobs, started in this order as workers become free. Put the longest first.
        workers (int, optional): Number of jobs to run at once. Defaults to :func:`available_cores`.
        on_done (Callable, optional): Called with the :class:`JobResult` of each job as soon as the job ends.
        file (TextIO, optional): Stream for the progress display. Defaults to ``sys.stdout``.
        interval (float): Seconds between two plain lines of a job. Defaults to 20.
        gpus (list[str]): GPUs to distribute the jobs over, as in ``CUDA_VISIBLE_DEVICES``: each job sees one of them,
            the one with the fewest running jobs. Defaults to ``()``: all jobs see the GPUs of this process.

    Returns:
        list[JobResult]: Results in the order of ``jobs``.

    Raises:
        ValueError: If two jobs have the same name, or ``after`` names a job that is not listed earlier.
        KeyboardInterrupt: On Ctrl-C, after all jobs have ended.
        SystemExit: On SIGTERM or SIGHUP, after all jobs have ended.
    """
    names = [job.name for job in jobs]
    for index, job in enumerate(jobs):
        if job.name in names[:index]:
            raise ValueError(f"Two jobs are named '{job.name}'.")
        for name in set(job.after).difference(names[:index]):
            raise ValueError(f"The job '{job.name}' waits for the job '{name}', which must be listed before it.")
    workers = available_cores() if workers is None else workers
    waiting, running, results = list(jobs), [], {}
    with _exit_on_signals(), _display(jobs, file or sys.stdout, interval) as display:
        try:
            while waiting or running:
                for job in list(waiting):
                    needed = [results.get(name) for name in job.after]
                    if any(result is not None and not result.ok for result in needed):
                        waiting.remove(job)
                        result = results[job.name] = JobResult(job.name, None, 0.0, job.log)
                        _end(result, None, display, on_done)
                    elif None not in needed and len(running) < workers:
                        waiting.remove(job)
                        used = [process.gpu for process in running]
                        running.append(_Process(job, min(gpus, key=used.count) if gpus else None))
                        display.started(running[-1])
                time.sleep(POLL)
                for process in list(running):
                    if process.popen.poll() is not None:
                        running.remove(process)
                        process.follow()
                        result = results[process.job.name] = process.result()
                        _end(result, process, display, on_done)
                display.refresh(running)
        finally:
            _stop([process.popen for process in running])
    return [results[job.name] for job in jobs]


class _Process:
    """A running job and its progress, read from its log."""

    def __init__(self, job: Job, gpu: Optional[str] = None):
        self.job, self.gpu = job, gpu
        self.status, self.fraction = 'running', None
        self.metric: Optional[str] = None
        self._ends_at: Optional[float] = None
        self._max_epochs: Optional[int] = None
        command = [str(part) for part in (job.command() if callable(job.command) else job.command)]
        visible = {} if gpu is None else {'CUDA_VISIBLE_DEVICES': gpu}
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open('wb') as log:
            # in a new session, jobs do not receive the terminal's Ctrl-C; run_parallel ends them in order
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD, **visible, 'PYTHONUNBUFFERED': '1'},
                start_new_session=True,
            )
        self.start = time.monotonic()
        self._log = job.log.open(encoding='utf-8', errors='replace')
        self._rest = ''  # start of the last line, which the job has not finished writing

    def follow(self) -> None:
        """Read the new lines of the log."""
        *lines, self._rest = (self._rest + self._log.read()).split('\n')
        for line in lines:
            step = STEP.search(line)
            if step is not None:
                self._read_step(step, line)

    def _read_step(self, step: 're.Match', line: str) -> None:
        number, count = int(step['step']), int(step['steps'])
        value = re.search(rf' {re.escape(self.job.metric)}: (\S+)', line) if self.job.metric else None
        if value is not None:
            self.metric = f'{self.job.metric.split("/")[-1]} {value[1]}'
        if step['mode'] != 'train':
            self.status, self._ends_at = ('testing' if step['mode'] == 'test' else 'validating'), None
            if step['mode'] == 'test':
                self.fraction = number / count
            return
        eta = ETA.search(line)
        if eta is not None:
            days, hours, minutes, seconds = (int(part or 0) for part in eta.groups())
            self._ends_at = time.monotonic() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        if step['epoch'] is None:
            self.status, self.fraction = f'iteration {number} of {count}', number / count
            return
        self.status, epoch, epochs = f'epoch {int(step["epoch"])}', int(step['epoch']), self._read_max_epochs()
        if epochs is not None:
            self.status += f' of {epochs}'
            self.fraction = (epoch - 1 + number / count) / epochs

    def _read_max_epochs(self) -> Optional[int]:
        starts = sorted(self.job.work_dir.glob('*/vis_data/config.py')) if self.job.work_dir else []
        if self._max_epochs is None and starts:
            cfg = Config.fromfile(starts[-1], import_custom_modules=False)
            self._max_epochs = cfg.train_cfg.get('max_epochs')
        return self._max_epochs

    def describe(self) -> str:
        """Describe the progress of the job in a few words."""
        parts = [self.status]
        if self._ends_at is not None:
            left = max(0.0, self._ends_at - time.monotonic())
            parts.append(f'{left:.0f} s left' if left < 60 else f'{left / 60:.1f} min left')
        return ', '.join([*parts, *([self.metric] if self.metric else [])])

    def result(self) -> JobResult:
        self._log.close()
        return JobResult(self.job.name, self.popen.returncode, time.monotonic() - self.start, self.job.log)


class _Lines:
    """Progress display with plain lines."""

    def __init__(self, console: Console, interval: float):
        self._console, self._interval = console, interval
        self._printed: Dict[str, float] = {}  # time of the last line per job
        self._metrics: Dict[str, Optional[str]] = {}

    def started(self, process: _Process) -> None:
        self._line(process.job.name, f'started, log: {shorten_path(process.job.log)}')

    def ended(self, name: str, text: str) -> None:
        self._line(name, text)

    def show(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def refresh(self, running: Sequence[_Process]) -> None:
        for process in running:
            name = process.job.name
            process.follow()
            is_new = process.metric != self._metrics.get(name)
            self._metrics[name] = process.metric
            if is_new or time.monotonic() - self._printed[name] > self._interval:
                self._line(name, process.describe())

    def _line(self, name: str, text: str) -> None:
        self._printed[name] = time.monotonic()
        self._console.print(Text(f'{time.strftime("%H:%M:%S")}  {name}: {text}'), soft_wrap=True)


class _Bars:
    """Progress display with one bar per job."""

    def __init__(self, jobs: Sequence[Job], live: Live):
        self._live = live
        self._rows = {job.name: ('waiting', 0.0) for job in jobs}  # text and finished fraction of each job
        self._drawn = 0.0

    def started(self, process: _Process) -> None:
        self._rows[process.job.name] = ('starting', 0.0)

    def ended(self, name: str, text: str) -> None:
        self._rows[name] = (text, 1.0 if text.startswith('done') else self._rows[name][1])
        self._draw()

    def show(self, text: str) -> None:
        self._live.console.print(Text(text), soft_wrap=True)

    def refresh(self, running: Sequence[_Process]) -> None:
        if time.monotonic() - self._drawn < REFRESH:
            return
        for process in running:
            process.follow()
            self._rows[process.job.name] = (process.describe(), process.fraction or 0.0)
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for name, (text, fraction) in self._rows.items():
            table.add_row(Text(name, no_wrap=True), ProgressBar(total=1.0, completed=fraction, width=24), Text(text))
        self._live.update(table, refresh=True)


@contextmanager
def _display(jobs: Sequence[Job], file: TextIO, interval: float) -> Iterator[Union[_Lines, _Bars]]:
    console = Console(file=file, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(console, interval)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield _Bars(jobs, live)


def _end(result: JobResult, process: Optional[_Process], display: Union[_Lines, _Bars], on_done) -> None:
    """Report how a job ended, and show the end of the log if the job failed."""
    minutes = f'{result.seconds:.0f} s' if result.seconds < 60 else f'{result.seconds / 60:.1f} min'
    if result.ok:
        metric = f', {process.metric}' if process.metric else ''
        display.ended(result.name, f'done after {minutes}{metric}')
    elif result.returncode is None:
        display.ended(result.name, 'not started: a required job failed')
    else:
        code = result.returncode
        why = f'with exit code {code}' if code > 0 else f'with signal {_signal_name(-code)}'
        display.ended(result.name, f'failed {why} after {minutes}')
        lines = result.log.read_text(encoding='utf-8', errors='replace').splitlines()[-TAIL:]
        display.show('\n'.join([f'The end of {shorten_path(result.log)}:', *(f'    {line}' for line in lines)]))
    if on_done is not None:
        on_done(result)


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f'{name} (possibly out of memory)' if name == 'SIGKILL' else name


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit, so that the jobs are ended before this process exits."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and their subprocesses with SIGINT, then SIGTERM, then SIGKILL."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            for process in processes:
                _signal_group(process, number)
            end = time.monotonic() + GRACE
            while time.monotonic() < end and any(process.poll() is None for process in processes):
                time.sleep(POLL)
    finally:  # also after a second Ctrl-C, which ends the waiting
        for process in processes:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)  # also reaches subprocesses that outlive the process
    except ProcessLookupError:
        pass
