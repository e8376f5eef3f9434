"""Runs of a comparison: write their configs, lock the folder, and train the runs that have no result."""

import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, TextIO

from mmengine.config import Config

import mmdiffkd
from mmdiffkd.cli import quiet_packages, shorten_path
from mmdiffkd.engine.checkpoint import fingerprint, read_checkpoint
from mmdiffkd.models.distillers.teacher import Teacher
from mmdiffkd.models.encoders import PRETRAINED, is_encoder
from mmdiffkd.utils import read_config
from mmdiffkd.visualization.differences import BASELINE
from mmdiffkd.visualization.logs import NO_METRICS
from mmdiffkd.visualization.runs import NO_OBJECTS, choose_metric, newest_test, read_run

from .compare_configs import (
    check_same,
    config_text,
    has_test_split,
    make_method_config,
    make_teacher_config,
    scale_schedule,
    test_on_validation,
)
from .compare_table import aligned_markdown, compare_teacher
from .distill import Source
from .parallel import Job, JobResult, available_cores, available_gpus, run_parallel
from .preview import preview

TEACHER = 'teacher'
ERROR_LINE = re.compile(r'^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit)\b.*)$', re.MULTILINE)
NO_SPACE = 'No space left on device'
NO_RESULT, INTERRUPTED = 'no result yet', 'interrupted'


@contextmanager
def lock_folder(root: Path) -> Iterator[None]:
    """Lock the folder of a comparison. The system releases the lock when the process ends, even if it is killed."""
    with (root / 'compare.lock').open('a+', encoding='utf-8') as file:
        try:
            import fcntl  # missing on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(
                f'Another comparison is running in {shorten_path(root)} ({file.read().strip() or "unknown process"}); '
                'wait until it has ended, or choose another --work-dir.'
            ) from error
        except (ImportError, OSError) as error:  # some network file systems have no locks
            print(f'{root} cannot be locked ({error}): do not start a second comparison in it.')
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
        file.flush()
        yield


@dataclass
class Training:
    """A run: one method with one seed.

    Args:
        method (str): Name of the method.
        seed (int): Random seed.
        root (Path): Folder of the comparison.
        end (str): Last epoch or iteration, as in the name of its checkpoint: ``epoch_12`` or ``iter_1000``.
        is_tested (bool): Whether the config has a test split.
    """

    method: str
    seed: int
    root: Path
    end: str
    is_tested: bool

    @property
    def name(self) -> str:
        return f'{self.method}_seed{self.seed}'

    @property
    def folder(self) -> Path:
        return self.root / self.method / f'seed{self.seed}'

    @property
    def config(self) -> Path:
        return self.root / 'configs' / f'{self.name}.py'

    @property
    def log(self) -> Path:
        return self.root / 'logs' / f'{self.name}.log'

    @property
    def checkpoint(self) -> Path:
        return self.folder / f'{self.end}.pth'

    def val(self) -> Optional[dict]:
        """Return the metrics of the validation at the end of the training, or None if it has not run yet."""
        step = int(self.end.split('_')[1])
        for file in sorted(self.folder.glob('*/vis_data/scalars.json'), reverse=True):
            for record in map(_parsed, reversed(file.read_text('utf-8', errors='replace').splitlines())):
                if record.get('step') == step and 'iter' not in record:
                    return _metrics({key.removeprefix('val/'): value for key, value in record.items()})
        folder, metrics = newest_test(self.folder / 'val')
        return metrics if folder else None

    def test(self) -> Optional[dict]:
        """Return the metrics of the test, or None if it has not run yet."""
        folder, metrics = newest_test(self.folder)
        return metrics if folder else None

    @property
    def is_done(self) -> bool:
        return self.val() is not None and (not self.is_tested or self.test() is not None)

    def command(self) -> str:
        """Return the shell command that trains, validates or tests the run, without the steps that are done."""
        steps, is_trained = [], self.checkpoint.exists()
        if not is_trained:
            steps.append([sys.executable, _tool('train.py'), self.config, '--work-dir', self.folder, '--resume'])
        elif self.val() is None:  # the run was killed between its last checkpoint and its last validation
            config = self.config.with_name(f'{self.name}_val.py')
            config.write_text(config_text(test_on_validation(Config.fromfile(self.config))), 'utf-8')
            steps.append([sys.executable, _tool('test.py'), config, self.checkpoint, '--work-dir', self.folder / 'val'])
        if self.is_tested and not (is_trained and self.test() is not None):
            steps.append([sys.executable, _tool('test.py'), self.config, self.checkpoint, '--work-dir', self.folder])
        return ' && '.join(shlex.join(map(str, step)) for step in steps)

    def failure(self) -> Optional[str]:
        """Return why the last attempt at this run failed, from its log; None if the run is done or has no log here."""
        if not self.log.exists() or self.is_done:
            return None
        return read_failure(self.log)

    def record(self, fingerprint: str, is_waiting: bool) -> dict:
        """Return the result, or why there is none, as a dict for a line of ``results.jsonl``."""
        base = dict(arm=self.method, seed=self.seed)
        if not self.is_done:
            return dict(base, failed=(not is_waiting and self.failure()) or NO_RESULT)
        run = read_run(self.folder)
        return dict(
            base,
            val=self.val(),
            test=self.test() if self.is_tested else None,
            iterations=run.iterations,
            seconds=run.seconds and run.seconds * run.iterations,  # time of the iterations, without validation
            memory_mib=run.memory,
            versions=dict(run.versions, mmdiffkd=mmdiffkd.__version__),
            teacher=None if self.method == BASELINE else fingerprint,
        )


class ComparisonRuns:
    """The runs of a comparison in a folder.

    Args:
        root (Path): Folder of the comparison.
        student (Config): Config of the student.
        teacher (str, Path or Config): Config of the teacher.
        checkpoint (str): Weights of the teacher.
        schedule (float): Factor of the lengths of the training.

    Attributes:
        cfgs (dict[str, Config]): Config of each method, before ``schedule`` shortens it.
        trainings (list[Training]): All runs, sorted by seed.
        not_applicable (dict[str, str]): Presets that cannot distill this pair of models, with the reasons.
        state (dict): Content of ``compare.json``: ``previews`` and ``costs`` by method, and the teacher's fingerprint.
        is_tested (bool): Whether the student's config has a test split.

    Raises:
        ValueError: If the folder was made with different weights of the teacher.
    """

    def __init__(self, root: Path, student: Config, teacher: Source, checkpoint: str, schedule: float):
        self.root, self.student, self.schedule = root, student, schedule
        self.teacher, self.checkpoint = teacher, checkpoint
        self.state_file = root / 'compare.json'
        self.state = (
            json.loads(self.state_file.read_text('utf-8')) if self.state_file.exists() else dict(previews={}, costs={})
        )
        self.is_encoder = is_encoder(read_config(teacher).model)  # an encoder has no predictions to test
        self.fingerprint = _fingerprint(teacher, checkpoint)
        if self.state.setdefault('teacher', self.fingerprint) != self.fingerprint:
            raise ValueError(
                f'{shorten_path(root)} was made with different weights of the teacher than {checkpoint}; choose '
                'another --work-dir, because results of different teachers cannot be compared.'
            )
        self.is_tested = has_test_split(student)
        self.cfgs: Dict[str, Config] = {}
        self.not_applicable: Dict[str, str] = {}
        self.trainings: List[Training] = []
        self._waiting: Dict[str, Training] = {}  # runs that this call has yet to finish, by name

    def add_methods(self, methods: Dict[str, Optional[dict]], seeds: Sequence[int], strict: Set[str]) -> None:
        """Write the configs of all runs, and preview each method.

        Args:
            methods (dict[str, dict or None]): Settings of the methods by name; None for the student alone.
            seeds (list[int]): Seeds of each method.
            strict (set[str]): Methods that the user defined. An error in one of them is raised. All other methods are
                presets: a preset that cannot distill this pair of models is left out.

        Raises:
            ValueError: If a method of ``strict`` cannot be built, if no method can be built, or if a config file exists
                with different settings.
        """
        for name, settings in methods.items():
            is_new = name not in self.state['previews']
            try:
                with quiet_packages():
                    cfg = make_method_config(self.student, settings, self.teacher, self.checkpoint)
                    if is_new:
                        self.state['previews'][name] = dict(pairs=[]) if settings is None else _summary(preview(cfg))
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                if name in strict:  # an error in a method that the user defined with --arms
                    raise ValueError(f"The arm '{name}' cannot be built: {error}") from error
                self.not_applicable[name] = str(error)
                continue
            self.cfgs[name] = cfg
        if len(self.cfgs) == 1 and self.not_applicable:
            raise ValueError(f'No method applies to this pair of models. {" ".join(self.reasons())}')
        for name, cfg in self.cfgs.items():
            self._write_configs(name, scale_schedule(cfg, self.schedule), seeds)
        self.trainings.sort(key=lambda training: training.seed)  # all methods with the first seed come first
        self._save_state()

    def train(self, metric: Optional[str], jobs: Optional[int], commands: Optional[TextIO] = None) -> None:
        """Train the runs that have no result.

        Args:
            metric (str, optional): Metric to show. Defaults to the main metric.
            jobs (int, optional): Number of parallel runs. Defaults to one per GPU or CPU core.
            commands (TextIO, optional): Start nothing, and write one command per missing run to this stream.
        """
        gpus = available_gpus()
        workers = jobs or len(gpus) or available_cores()
        missing = [training for training in self.trainings if not training.is_done]
        _say(
            f'Comparing {", ".join(self.cfgs)} (seeds: {_numbers(t.seed for t in self.trainings)}) in '
            f'{shorten_path(self.root)}: {len(self.trainings) - len(missing)} of {len(self.trainings)} runs are done.'
        )
        if missing and commands is None:
            self._check_teacher(metric, gpus[:1])
            self._measure_costs({training.method for training in missing}, gpus[:1])
            missing = [training for training in missing if training.method in self.cfgs]
        self._show_preview(missing, workers)
        if commands is not None:
            listed = [shlex.join(self._teacher_command()), *(training.command() for training in missing)]
            print(''.join(f'{command}\n' for command in listed if command), end='', file=commands, flush=True)
        elif missing:
            self._run(missing, workers, gpus, metric)

    def write_records(self) -> List[dict]:
        """Write the results of all runs to ``results.jsonl``, and return them. Keep the lines of all other runs."""
        records = [training.record(self.fingerprint, training.name in self._waiting) for training in self.trainings]
        file, own = self.root / 'results.jsonl', {(record['arm'], record['seed']) for record in records}
        lines = file.read_text('utf-8').splitlines() if file.exists() else []
        others = [record for record in map(_parsed, lines) if record and (record['arm'], record['seed']) not in own]
        _write(file, ''.join(json.dumps(record) + '\n' for record in [*others, *records]))
        return records

    def teacher_metrics(self) -> Dict[str, float]:
        """Return the teacher's metrics on the validation split of the student; empty if it was not tested."""
        return newest_test(self.root / TEACHER)[1]

    def reasons(self) -> List[str]:
        """Return the reasons why methods are not applicable. Methods with the same reason share a sentence."""
        names: Dict[str, List[str]] = {}
        for name, reason in self.not_applicable.items():
            text = reason.replace(f"preset='{name}' ", 'the preset ', 1).split('; choose another preset')[0]
            names.setdefault(text.rstrip('.'), []).append(name)
        return [f'{", ".join(listed)}: {text}.' for text, listed in names.items()]

    def _save_state(self) -> None:
        _write(self.state_file, json.dumps(self.state, indent=1))

    def _write_configs(self, name: str, cfg: Config, seeds: Sequence[int]) -> None:
        end, text = last_step(cfg), None
        for seed in seeds:
            training = Training(name, seed, self.root, end, self.is_tested)
            self.trainings.append(training)
            randomness = {**(cfg.get('randomness') or {}), 'seed': seed}
            if training.config.exists():
                check_same(training.config, Config({**cfg.to_dict(), 'randomness': randomness}))
                continue
            text = text or config_text(cfg)
            _write(training.config, f'{text}\nrandomness = {randomness}\n')

    def _teacher_command(self) -> List[str]:
        """Return the command that tests the teacher on the student's validation split; empty if it was tested."""
        if self.is_encoder or newest_test(self.root / TEACHER)[0] is not None:
            return []
        config = self.root / 'configs' / f'{TEACHER}.py'
        config.write_text(config_text(make_teacher_config(self.student, self.teacher)), 'utf-8')
        command = [sys.executable, _tool('test.py'), config, self.checkpoint, '--work-dir', self.root / TEACHER]
        return list(map(str, command))

    def _check_teacher(self, metric: Optional[str], gpus: Sequence[str]) -> None:
        """Test the teacher, and compare it with the runs of the student alone that are done.

        Raises:
            ValueError: If the evaluation has no such metric.
        """
        if self.is_encoder:
            return
        command = self._teacher_command()
        if command:
            job = Job('test the teacher', command, self.root / 'logs' / f'{TEACHER}.log', metric=metric)
            run_parallel([job], workers=1, gpus=gpus)
        metrics = self.teacher_metrics()
        if not metrics:
            _say('Warning: the teacher could not be tested on the data of the student. Perhaps its classes differ.')
            return
        found = choose_metric([metrics], metric)
        _say(f'The teacher reaches {found} {metrics[found]:.4g} on the validation split of the student.')
        alone = [t.val().get(found, 0.0) for t in self.trainings if t.method == BASELINE and t.is_done]
        for note in compare_teacher(found, metrics[found], alone):
            _say(note)

    def _measure_costs(self, methods: Set[str], gpus: Sequence[str]) -> None:
        """Measure training iterations of methods that were not measured yet, in a separate process.

        A method whose iteration fails is left out, unless the method already has results.

        Raises:
            ValueError: If no method completes an iteration.
        """
        unknown = [name for name in self.cfgs if name in methods and name not in self.state['costs']]
        if not unknown:
            return
        names = list(dict.fromkeys([BASELINE, *unknown]))
        first = {t.method: t for t in reversed(self.trainings)}
        stems = {first[name].config.stem: name for name in names}
        out, log = self.root / 'costs.json', self.root / 'logs' / 'costs.log'
        command = [sys.executable, '-m', 'mmdiffkd.apis.costs', out, *(first[name].config for name in names)]
        job = Job('measure an iteration of each method', command, log)
        (result,) = run_parallel([job], workers=1, gpus=gpus)
        if not result.ok:
            raise ValueError(f'A training iteration of the student alone failed: {read_failure(log)}')
        for stem, costs in json.loads(out.read_text('utf-8')).items():
            name = stems[stem]
            if 'error' not in costs:
                self.state['costs'][name] = costs
            elif not any(training.is_done for training in self.trainings if training.method == name):
                self.not_applicable[name] = f'an iteration failed: {costs["error"]}'
                self.cfgs.pop(name)
        out.unlink()
        self.trainings = [training for training in self.trainings if training.method in self.cfgs]
        self._save_state()
        if len(self.cfgs) == 1 and self.not_applicable:
            raise ValueError(f'No method completes an iteration. {" ".join(self.reasons())}')

    def _show_preview(self, missing: Sequence[Training], workers: int) -> None:
        """Print pairs and costs of all methods, and the estimated time of the missing runs."""
        rows = []
        for name in self.cfgs:
            seen, cost = self.state['previews'][name], self.state['costs'].get(name, {})
            rows.append(
                {
                    'method': name,
                    'pairs (levels)': ', '.join(seen['pairs']) or '–',
                    'loss weights': ', '.join(seen.get('weights', ())) or '–',
                    'added parameters (M)': _number(seen.get('parameters'), 1e6),
                    'added multiply-adds (G)': _number(seen.get('gmacs')),
                    's per iteration': _number(cost.get('seconds')),
                    'relative time': _number(cost.get('time')),
                    'memory (MiB)': _number(cost.get('peak_mib')),
                }
            )
        _say('\n'.join(['', aligned_markdown(rows), *(f'Not applicable: {reason}' for reason in self.reasons())]))
        times = list(map(self._seconds, missing))
        if missing and all(times):
            seconds = sum(times)
            workers = min(workers, len(missing))
            _say(
                f'The {len(missing)} missing runs take about {_duration(seconds / workers)} with {workers} at a time, '
                'not counting validation.'
            )
        _say('')

    def _run(self, missing: Sequence[Training], workers: int, gpus: Sequence[str], metric: Optional[str]) -> None:
        if metric is None:
            metric = choose_metric([self.teacher_metrics()])
        _say('Press Ctrl-C to stop; run the same command to continue.')
        # start the longest run of each seed first, so that the workers finish at about the same time
        missing = sorted(missing, key=lambda training: (training.seed, -self._seconds(training)))
        for _ in range(2):  # the second round only repeats missing validations
            jobs = [
                Job(training.name, ['sh', '-c', training.command()], training.log, training.folder, metric)
                for training in missing
            ]
            self._waiting = {job.name: training for job, training in zip(jobs, missing)}
            self._clock = _Clock(sum(map(self._seconds, missing)), min(workers, len(missing)))
            done = run_parallel(jobs, workers, self._save_result, gpus=gpus)
            missing = [training for training, result in zip(missing, done) if result.ok and not training.is_done]
            if not missing:
                return

    def _seconds(self, training: Training) -> float:
        """Return the estimated time of a run; 0 if it is not known."""
        cost = self.state['costs'].get(training.method)
        return cost['seconds'] * cost['iterations'] if cost else 0.0

    def _save_result(self, result: JobResult) -> None:
        training = self._waiting.pop(result.name)
        self._clock.ended(result.seconds, self._seconds(training))
        left = self._clock.left()
        if self._waiting and left is not None:
            count = len(self._waiting)
            _say(f'{count} {"run" if count == 1 else "runs"} left: about {_duration(left)}.')
        try:
            self.write_records()
        except OSError as error:  # such as a full disk, which must not stop the other runs
            _say(f'The results cannot be written yet: {error.strerror}.')


class _Clock:
    """Estimate of the time that is left until all runs have ended.

    Args:
        estimated (float): Sum of the estimated seconds of all runs; 0 if it is not known.
        workers (int): Number of parallel runs.
    """

    def __init__(self, estimated: float, workers: int):
        self.estimated, self.workers = estimated, workers
        self.start, self.ended_seconds, self.ended_estimates = time.monotonic(), 0.0, 0.0

    def ended(self, seconds: float, estimate: float) -> None:
        """Count a run that has ended."""
        self.ended_seconds += seconds
        self.ended_estimates += estimate

    def left(self) -> Optional[float]:
        """Return the seconds that are left, or None if they are unknown.

        The estimate is corrected: if the runs so far took twice the estimated time, so will the remaining runs.
        """
        if not self.ended_estimates:
            return None
        slowness = self.ended_seconds / self.ended_estimates
        return max(0.0, slowness * self.estimated / self.workers - (time.monotonic() - self.start))


def last_step(cfg: Config) -> str:
    """Return the last epoch or iteration as in the name of its checkpoint: ``epoch_12`` or ``iter_1000``."""
    kind = 'epoch' if 'max_epochs' in cfg.train_cfg else 'iter'
    return f'{kind}_{cfg.train_cfg[f"max_{kind}s"]}'


def _tool(name: str) -> Path:
    """Return the path of a script of ``tools``: in the package's folder ``.mim``, or in the repository."""
    package = Path(mmdiffkd.__file__).parent
    files = [package / '.mim' / 'tools' / name, package.parent / 'tools' / name]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f'{files[1]} does not exist; install mmdiffkd from its repository or its wheel.')
    return found


def _say(text: str) -> None:
    print(text, flush=True)


def _summary(report: dict) -> dict:
    """Shorten the result of :func:`.preview` to the cells of a table."""
    levels: Dict[str, List[int]] = {}
    weights: Dict[str, float] = {}
    for row in report['pairs']:
        levels.setdefault(row['pair'], []).append(row['level'])
        if row.get('loss_weight') is not None:
            weights.setdefault(row['pair'], row['loss_weight'])
    gmacs = [report['gmacs'][part] for part in ('teacher', 'diffusion_module')]
    return dict(
        pairs=[f'{pair} ({_numbers(numbers)})' for pair, numbers in levels.items()],
        weights=[f'{pair} {weight if isinstance(weight, str) else f"{weight:g}"}' for pair, weight in weights.items()],
        parameters=report['parameters']['diffusion_module'],
        gmacs=None if None in gmacs else sum(gmacs),
    )


def _numbers(numbers) -> str:
    return ', '.join(map(str, sorted(set(numbers))))


def _number(value: Optional[float], divisor: float = 1) -> str:
    return '–' if value is None else f'{value / divisor:.3g}' if value < 1000 * divisor else f'{value / divisor:.0f}'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} minutes' if seconds < 5400 else f'{seconds / 3600:.1f} hours'


def _write(file: Path, text: str) -> None:
    """Write a file atomically."""
    part = file.with_suffix('.part')
    part.write_text(text, 'utf-8')
    part.replace(file)


def _fingerprint(teacher: Source, checkpoint: str) -> str:
    """Return the hash of the teacher's weights."""
    if checkpoint != PRETRAINED:
        return fingerprint(read_checkpoint(checkpoint)['state_dict'])
    loaded = Teacher(teacher.to_dict() if isinstance(teacher, Config) else teacher, checkpoint)
    return fingerprint(loaded.model.state_dict())


def _parsed(line: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError:  # the last line of a killed run may be incomplete
        return {}
    return record if isinstance(record, dict) else {}


def _metrics(record: dict) -> dict:
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key not in NO_METRICS}
    return {key: value for key, value in numbers.items() if value != NO_OBJECTS}


def read_failure(log: Path) -> str:
    """Return the reason why a run failed, from the end of its log."""
    text = log.read_text('utf-8', errors='replace')[-20_000:]
    if NO_SPACE in text or shutil.disk_usage(log.parent).free < 2**20:
        return NO_SPACE.lower()
    errors = ERROR_LINE.findall(text)
    if not errors:
        return f'ended without an error message, perhaps out of memory; see {shorten_path(log)}'
    return INTERRUPTED if errors[-1].startswith('KeyboardInterrupt') else errors[-1].removeprefix('Error: ')[:300]
