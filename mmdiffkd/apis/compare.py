"""Train a student with several distillation methods and seeds, and compare the results."""

import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, TextIO, Tuple, Union

from mmengine.config import Config
from mmengine.logging import MMLogger

import mmdiffkd
from mmdiffkd.cli import quiet_packages, shorten_path
from mmdiffkd.engine.checkpoint import fingerprint, read_checkpoint
from mmdiffkd.utils import closest_names, read_config, zoo_checkpoint
from mmdiffkd.visualization.comparison import (
    Values,
    aligned_markdown,
    best_method,
    comparison_rows,
    conclude,
    draw_comparison,
)
from mmdiffkd.visualization.differences import BASELINE
from mmdiffkd.visualization.logs import NO_METRICS
from mmdiffkd.visualization.report import write_report
from mmdiffkd.visualization.runs import MAIN_METRIC, NO_OBJECTS, newest_test, read_groups, read_run

from .compare_configs import (
    check_same,
    config_text,
    has_test_split,
    make_method_config,
    make_teacher_config,
    scale_schedule,
    test_on_validation,
)
from .distill import Source
from .list_presets import list_presets
from .parallel import Job, JobResult, available_cores, available_gpus, run_parallel
from .preview import preview

ARM_KEYS = ('preset', 'distill', 'init_from_teacher', 'custom_hooks')
ARM_NAME = re.compile(r'[\w.=+-]+')  # also the name of a folder, and part of shell commands
TEACHER = 'teacher'
ERROR_LINE = re.compile(r'^(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit)\b.*)$', re.MULTILINE)
NO_SPACE = 'No space left on device'
NO_RESULT, INTERRUPTED = 'no result yet', 'interrupted'


def compare(
    student_config: Source,
    teacher_config: Source,
    teacher_checkpoint: str = 'zoo',
    presets: Optional[Sequence[str]] = None,
    arms: Optional[Dict[str, Optional[dict]]] = None,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: float = 1.0,
    jobs: Optional[int] = None,
    work_dir: Union[str, Path] = 'work_dirs/compare',
    metric: Optional[str] = None,
    list_runs: bool = False,
    cfg_options: Optional[dict] = None,
) -> dict:
    """Train a student alone and with several methods, and compare the results, paired by seed.

    A run trains one method with one seed, by ``tools/train.py`` in the folder ``WORK_DIR/METHOD/seedN``. Runs that have
    a result are skipped, and interrupted runs continue: to go on after an interruption, to repeat failed runs, or to
    add methods and seeds, call the function again. With the same seed, all methods start from the same student and see
    the same images in the same order. The best method is chosen on the validation split. Results are reported on the
    test split, if the student's config has a different data set for it.

    Args:
        student_config (str, Path or Config): Config of the student: ``pkg::path``, a file, or a loaded config. Data,
            schedule and optimizer come from this config.
        teacher_config (str, Path or Config): Config of the teacher.
        teacher_checkpoint (str): Weights of the teacher: a path, a URL, or ``'zoo'``. Defaults to ``'zoo'``.
        presets (list[str], optional): Presets to compare. The student alone is always compared. Defaults to all
            presets, or to none if there are ``arms``.
        arms (dict[str, dict], optional): Other methods by name, with the keys ``preset``, ``distill``,
            ``init_from_teacher`` and ``custom_hooks`` as in :func:`.distill`. Defaults to None.
        seeds (list[int]): Seeds of each method. Defaults to ``(0, 1, 2)``.
        schedule (float): Factor of all lengths of the training, such as epochs and learning-rate steps. Defaults to 1.
        jobs (int, optional): Number of parallel runs. Defaults to one per GPU, or without GPUs, one per CPU core.
        work_dir (str or Path): Folder of the comparison. Defaults to ``'work_dirs/compare'``.
        metric (str, optional): Metric to compare, such as ``'coco/bbox_mAP'``; higher must be better. Defaults to the
            main metric of the evaluator.
        list_runs (bool): Start nothing, print one shell command per missing run, and summarize the results that exist.
            Defaults to False.
        cfg_options (dict, optional): Overrides of the student's config.

    Returns:
        dict: The comparison:

        * ``rows``: table rows, as strings by column; ``conclusion``: what the intervals allow to say.
        * ``results``: one dict per run, as in ``results.jsonl``.
        * ``best``: name of the best method on the validation split; None without results.
        * ``not_applicable``: reasons of the presets that cannot distill this pair of models, by name.
        * ``missing``: names of runs without a result.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If a config, data or the weights do not exist.
        ValueError: If a setting is invalid, no method applies to this pair of models, or the folder was made with other
            settings.
        BlockingIOError: If another comparison is running in the folder.
    """
    student = Config(read_config(student_config, cfg_options).to_dict())  # types as strings, which can be dumped
    _check_student(student, schedule, seeds)
    if 'student' in read_config(teacher_config).model:
        raise ValueError('The config of the teacher is a distillation config; give the config of a plain model.')
    methods = _read_methods(presets, arms)
    if teacher_checkpoint == 'zoo' and not isinstance(teacher_config, Config):
        teacher_checkpoint = zoo_checkpoint(str(teacher_config))
    if not isinstance(teacher_config, Config) and '::' not in str(teacher_config):
        teacher_config = Path(teacher_config).resolve()
    root = Path(work_dir).resolve()
    (root / 'configs').mkdir(parents=True, exist_ok=True)
    commands = sys.stdout if list_runs else None
    with _lock(root), _output_to_stderr() if list_runs else nullcontext():
        comparison = _Comparison(root, student, teacher_config, teacher_checkpoint, schedule, commands)
        comparison.add_methods(methods, seeds, strict=set(arms or ()))
        return comparison.run(metric, jobs)


def _check_student(student: Config, schedule: float, seeds: Sequence[int]) -> None:
    if 'student' in student.model:
        raise ValueError(
            'The config of the student is already a distillation config; give the config of a plain model.'
        )
    needed = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'val_dataloader', 'val_evaluator', 'val_cfg')
    missing = [key for key in needed if student.get(key) is None]  # val_cfg may be empty
    if missing:
        raise ValueError(
            f"The student's config has no {missing[0]}: a comparison trains with its settings and chooses the best "
            'method on its validation split.'
        )
    if not schedule > 0:
        raise ValueError(f'schedule={schedule} must be a positive factor, such as 0.5 for half of the training.')
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f'seeds={list(seeds)} must be different numbers, such as 0 1 2.')


def _read_methods(presets: Optional[Sequence[str]], arms: Optional[dict]) -> Dict[str, Optional[dict]]:
    """Return the settings of all methods by name, the student alone first."""
    known = list_presets()
    for name in presets or ():
        if name not in known and name != BASELINE:
            raise ValueError(f"There is no preset '{name}'; the nearest are {closest_names(name, known)}.")
    chosen = presets if presets is not None else () if arms else known
    methods = {BASELINE: None, **{name: dict(preset=name) for name in chosen if name != BASELINE}}
    for name, settings in (arms or {}).items():
        if not ARM_NAME.fullmatch(str(name)) or name == TEACHER:
            raise ValueError(
                f"The name of the arm '{name}' names a folder: use other letters, digits, or one of . _ = + -"
                + (f", such as '{re.sub('[^A-Za-z0-9.=+-]+', '_', str(name))}'." if name != TEACHER else '.')
            )
        if name in methods and settings != methods[name]:
            raise ValueError(f"The arm '{name}' has the name of a method that is compared as well; rename the arm.")
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"The arm '{name}' must be a dict with keys of {', '.join(ARM_KEYS)}, or None.")
        for key in settings or ():
            if key not in ARM_KEYS:
                raise ValueError(
                    f"The arm '{name}' has no key '{key}'; the nearest are {closest_names(key, ARM_KEYS)}."
                )
        methods[name] = settings
    return methods


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Redirect output and logs to stderr, so that a file or a pipe gets nothing but the listed commands."""
    handlers = [h for h in MMLogger.get_current_instance().handlers if getattr(h, 'stream', None) is sys.stdout]
    before = sys.stdout
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for handler in handlers:
            handler.setStream(before)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Lock the folder. The lock of a process that has ended, even if killed, is free."""
    with (root / 'compare.lock').open('a+', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(
                f'Another comparison is running in {shorten_path(root)} ({file.read().strip() or "unknown process"}); '
                'wait for its end, or choose another --work-dir.'
            ) from error
        except OSError as error:  # some network file systems have no locks
            print(f'{root} cannot be locked ({error.strerror}): do not start a second comparison in it.')
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
        """Return the metrics of the validation after the training, or None if there was none yet."""
        step = int(self.end.split('_')[1])
        for file in sorted(self.folder.glob('*/vis_data/scalars.json'), reverse=True):
            for record in map(_parsed, reversed(file.read_text('utf-8', errors='replace').splitlines())):
                if record.get('step') == step and 'iter' not in record:
                    return _metrics({key.removeprefix('val/'): value for key, value in record.items()})
        folder, metrics = newest_test(self.folder / 'val')
        return metrics if folder else None

    def test(self) -> Optional[dict]:
        """Return the metrics of the test, or None if there was none yet."""
        folder, metrics = newest_test(self.folder)
        return metrics if folder else None

    @property
    def is_done(self) -> bool:
        return self.val() is not None and (not self.is_tested or self.test() is not None)

    def command(self) -> str:
        """Return the shell command of the steps that are missing."""
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
        """Return why the last start failed, as far as its log says; None if it was not started here."""
        if not self.log.exists() or self.is_done:
            return None
        return read_failure(self.log)

    def record(self, fingerprint: str, is_waiting: bool) -> dict:
        """Return the result as a line of ``results.jsonl``."""
        base = dict(arm=self.method, seed=self.seed)
        if not self.is_done:
            return dict(base, failed=(not is_waiting and self.failure()) or NO_RESULT)
        run = read_run(self.folder)
        return dict(
            base,
            val=self.val(),
            test=self.test() if self.is_tested else None,
            iterations=run.iterations,
            seconds=run.seconds and run.seconds * run.iterations,  # without validation
            memory_mib=run.memory,
            versions=dict(run.versions, mmdiffkd=mmdiffkd.__version__),
            teacher=None if self.method == BASELINE else fingerprint,
        )


class _Comparison:
    """Runs of a comparison in a folder."""

    def __init__(self, root: Path, student: Config, teacher, checkpoint: str, schedule: float, commands):
        self.root, self.student, self.schedule = root, student, schedule
        self.teacher, self.checkpoint = teacher, checkpoint
        self.commands: Optional[TextIO] = commands  # stream of the commands; None runs them
        self.state_file = root / 'compare.json'
        self.state = (
            json.loads(self.state_file.read_text('utf-8')) if self.state_file.exists() else dict(previews={}, costs={})
        )
        self.fingerprint = fingerprint(read_checkpoint(checkpoint)['state_dict'])
        if self.state.setdefault('teacher', self.fingerprint) != self.fingerprint:
            raise ValueError(
                f'{shorten_path(root)} was made with other weights of the teacher than {checkpoint}; choose another '
                '--work-dir, because results of different teachers cannot be compared.'
            )
        self.is_tested = has_test_split(student)
        self.cfgs: Dict[str, Config] = {}  # with the full schedule
        self.not_applicable: Dict[str, str] = {}
        self.trainings: List[Training] = []
        self.waiting: Set[str] = set()  # names of the runs that this process has not finished

    def say(self, text: str) -> None:
        print(text, flush=True)

    def save_state(self) -> None:
        _write(self.state_file, json.dumps(self.state, indent=1))

    def add_methods(self, methods: Dict[str, Optional[dict]], seeds: Sequence[int], strict: Set[str]) -> None:
        """Write the configs of all runs, and preview each method.

        Raises:
            ValueError: If a method of ``strict`` cannot be built, if no method can, or if a config exists with other
                settings.
        """
        for name, settings in methods.items():
            cfg = make_method_config(self.student, settings, self.teacher, self.checkpoint)
            if name not in self.state['previews']:
                try:
                    with quiet_packages():
                        self.state['previews'][name] = dict(pairs=[]) if settings is None else _summary(preview(cfg))
                except (ValueError, TypeError, KeyError, RuntimeError) as error:
                    if name in strict:  # a mistake in the arms file
                        raise ValueError(f"The arm '{name}' cannot be built: {error}") from error
                    self.not_applicable[name] = str(error)
                    continue
            self.cfgs[name] = cfg
        if len(self.cfgs) == 1 and self.not_applicable:
            reasons = '; '.join(f'{name}: {reason}' for name, reason in self.not_applicable.items())
            raise ValueError(f'No method applies to this pair of models. {reasons}')
        for name, cfg in self.cfgs.items():
            self._write_configs(name, scale_schedule(cfg, self.schedule), seeds)
        self.trainings.sort(key=lambda training: training.seed)  # all methods with the first seed come first
        self.save_state()

    def _write_configs(self, name: str, cfg: Config, seeds: Sequence[int]) -> None:
        end, text = _end_of(cfg), None
        for seed in seeds:
            training = Training(name, seed, self.root, end, self.is_tested)
            self.trainings.append(training)
            randomness = {**(cfg.get('randomness') or {}), 'seed': seed}
            if training.config.exists():
                check_same(training.config, Config({**cfg.to_dict(), 'randomness': randomness}))
                continue
            text = text or config_text(cfg)
            _write(training.config, f'{text}\nrandomness = {randomness}\n')

    def run(self, metric: Optional[str], jobs: Optional[int]) -> dict:
        gpus = available_gpus()
        workers = jobs or len(gpus) or available_cores()
        missing = [training for training in self.trainings if not training.is_done]
        self.say(
            f'Comparing {", ".join(self.cfgs)} (seeds: {_numbers(t.seed for t in self.trainings)}) in '
            f'{shorten_path(self.root)}: {len(self.trainings) - len(missing)} of {len(self.trainings)} runs are done.'
        )
        if missing and self.commands is None:
            self.check_teacher(metric, gpus[:1])
            self.measure_costs({training.method for training in missing}, gpus[:1])
            missing = [training for training in missing if training.method in self.cfgs]
        self.show_preview(missing, workers)
        if self.commands is not None:
            commands = [shlex.join(self.teacher_command()), *(training.command() for training in missing)]
            print(''.join(f'{command}\n' for command in commands if command), end='', file=self.commands, flush=True)
        elif missing:
            self.train(missing, workers, gpus, metric)
        return self.finish(metric)

    def teacher_command(self) -> List[str]:
        """Return the command that tests the teacher on the student's validation split; empty if it was tested."""
        if newest_test(self.root / TEACHER)[0] is not None:
            return []
        config = self.root / 'configs' / f'{TEACHER}.py'
        config.write_text(config_text(make_teacher_config(self.student, self.teacher)), 'utf-8')
        command = [sys.executable, _tool('test.py'), config, self.checkpoint, '--work-dir', self.root / TEACHER]
        return list(map(str, command))

    def check_teacher(self, metric: Optional[str], gpus: Sequence[str]) -> None:
        """Test the teacher, and compare it with the runs of the student alone that are done.

        Raises:
            ValueError: If the evaluation has no such metric.
        """
        command = self.teacher_command()
        if command:
            job = Job('test the teacher', command, self.root / 'logs' / f'{TEACHER}.log', metric=metric)
            run_parallel([job], workers=1, gpus=gpus)
        metrics = newest_test(self.root / TEACHER)[1]
        if not metrics:
            self.say('Warning: the teacher could not be tested on the data of the student; its classes may differ.')
            return
        found = _main_metric([metrics], metric)
        self.say(f'The teacher reaches {found} {metrics[found]:.4g} on the validation split of the student.')
        alone = {t.seed: t.val().get(found, 0.0) for t in self.trainings if t.method == BASELINE and t.is_done}
        for note in self._teacher_notes(found, {BASELINE: alone}):
            self.say(note)

    def measure_costs(self, methods: Set[str], gpus: Sequence[str]) -> None:
        """Measure training iterations of methods that were not measured yet, in a process of its own.

        A method whose iteration fails is left out, unless it has results, perhaps from another machine.

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
            raise ValueError(f'The student alone cannot be trained for an iteration: {read_failure(log)}')
        for stem, costs in json.loads(out.read_text('utf-8')).items():
            name = stems[stem]
            if 'error' not in costs:
                self.state['costs'][name] = costs
            elif not any(training.is_done for training in self.trainings if training.method == name):
                self.not_applicable[name] = f'an iteration failed: {costs["error"]}'
                self.cfgs.pop(name)
        out.unlink()
        self.trainings = [training for training in self.trainings if training.method in self.cfgs]
        self.save_state()
        if len(self.cfgs) == 1 and self.not_applicable:
            reasons = '; '.join(f'{name}: {reason}' for name, reason in self.not_applicable.items())
            raise ValueError(f'No method completes an iteration. {reasons}')

    def show_preview(self, missing: Sequence[Training], workers: int) -> None:
        """Print pairs and costs of all methods, and the time that the missing runs take."""
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
                    'time': _number(cost.get('time')),
                    'memory (MiB)': _number(cost.get('peak_mib')),
                }
            )
        self.say(f'\n{aligned_markdown(rows)}')
        for name, reason in self.not_applicable.items():
            self.say(f'Not applicable: {name}: {reason}')
        costs = [self.state['costs'].get(training.method) for training in missing]
        if missing and all(costs):
            seconds = sum(cost['seconds'] * cost['iterations'] for cost in costs)
            workers = min(workers, len(missing))
            self.say(
                f'The {len(missing)} missing runs take about {_duration(seconds / workers)} with {workers} at a time, '
                'without validations.'
            )
        self.say('')

    def train(self, missing: Sequence[Training], workers: int, gpus: Sequence[str], metric: Optional[str]) -> None:
        if metric is None:
            metric = _main_metric([newest_test(self.root / TEACHER)[1]], None)
        self.say('Press Ctrl-C to stop; the same command continues.')
        for _ in range(2):  # the second time only for runs whose last validation is missing
            jobs = [
                Job(training.name, ['sh', '-c', training.command()], training.log, training.folder, metric)
                for training in missing
            ]
            self.waiting = {job.name for job in jobs}
            done = run_parallel(jobs, workers, self._save_result, gpus=gpus)
            missing = [training for training, result in zip(missing, done) if result.ok and not training.is_done]
            if not missing:
                return

    def _save_result(self, result: JobResult) -> None:
        self.waiting.discard(result.name)
        try:
            self._write_results()
        except OSError as error:  # such as a full disk, which must not stop the other runs
            self.say(f'The results cannot be written yet: {error.strerror}.')

    def _write_results(self) -> List[dict]:
        """Write all results to ``results.jsonl``, and return them."""
        records = [training.record(self.fingerprint, training.name in self.waiting) for training in self.trainings]
        _write(self.root / 'results.jsonl', ''.join(json.dumps(record) + '\n' for record in records))
        return records

    def finish(self, metric: Optional[str]) -> dict:
        """Write table, picture, report and the config of the best method."""
        records = self._write_results()
        found = [record for record in records if 'failed' not in record]
        failed = [record for record in records if 'failed' in record]
        result = dict(rows=[], conclusion='There are no results yet.', results=records, best=None)
        result.update(not_applicable=self.not_applicable, missing=[f'{r["arm"]}_seed{r["seed"]}' for r in failed])
        notes = [f'{r["arm"]}, seed {r["seed"]}: {_why(r["failed"])}.' for r in failed if r['failed'] != NO_RESULT]
        absent = [f'{r["arm"]} (seed {r["seed"]})' for r in failed if r['failed'] == NO_RESULT]
        notes += [f'No result yet: {", ".join(absent)}.'] if absent else []
        notes += [f'Not applicable: {name}: {reason}' for name, reason in self.not_applicable.items()]
        if not found:
            self.say('\n'.join([*notes, result['conclusion']]))
            return result
        metric = _main_metric([record['val'] for record in found], metric)
        values = self._values(found, metric)
        split, reported = list(values.items())[-1]
        reasons = {record['arm']: _why(record['failed']) for record in reversed(failed)}
        rows = comparison_rows(metric, values, self._costs(found), reasons)
        best, conclusion = best_method(values['val']), conclude(metric, values)
        result.update(rows=rows, conclusion=conclusion, best=best)
        notes = [conclusion, *self._teacher_notes(metric, values['val']), *notes]
        if not self.is_tested:
            notes.append('The config of the student has no test split of its own: results are those on val.')
        table = aligned_markdown(rows)
        listed = '\n'.join(f'* {note}' for note in notes)
        (self.root / 'table.md').write_text(f'{table}\n\n{listed}\n', 'utf-8')
        self.say(f'\n{table}\n\n{listed}')
        self._draw(found, metric, split, reported, notes)
        if best is not None:
            self._write_best(best, values['val'][best], metric, split)
        return result

    def _values(self, found: Sequence[dict], metric: str) -> Dict[str, Values]:
        """Return the metric by split, method and seed."""
        values: Dict[str, Values] = {split: {} for split in ('val', 'test')[: 1 + self.is_tested]}
        for record in found:
            for split in values:
                # mmdet leaves out the metric if there are no detections
                value = record[split].get(metric, 0.0)
                values[split].setdefault(record['arm'], {})[record['seed']] = value
        return values

    def _costs(self, found: Sequence[dict]) -> Dict[str, dict]:
        """Return the costs of each method: measured iterations, or else those in the logs of the runs."""
        costs = {}
        logged = {record['arm']: record for record in found}
        alone = logged.get(BASELINE) or {}
        for name in self.cfgs:
            cost, seen = self.state['costs'].get(name, {}), self.state['previews'][name]
            time, memory = cost.get('time'), cost.get('peak_mib')
            record = logged.get(name)
            if time is None and record and record['seconds'] and alone.get('seconds'):
                time, memory = record['seconds'] / alone['seconds'], record['memory_mib']
            costs[name] = dict(time=time, memory=memory, gmacs=seen.get('gmacs'))
        return costs

    def _teacher_notes(self, metric: str, val: Values) -> List[str]:
        teacher, alone = newest_test(self.root / TEACHER)[1].get(metric), val.get(BASELINE)
        if teacher is None or not alone:
            return []
        mean = sum(alone.values()) / len(alone)
        if teacher > mean:
            return [f'On val, the teacher has {metric} {teacher:.4g} and the student alone {mean:.4g}.']
        return [
            f'Warning: the teacher ({metric} {teacher:.4g} on val) is not better than the student alone ({mean:.4g}): '
            'check its weights, or choose a better teacher.'
        ]

    def _draw(self, found: Sequence[dict], metric: str, split: str, reported: Values, notes: Sequence[str]) -> None:
        done = {(record['arm'], record['seed']) for record in found}
        named: List[Tuple[Optional[str], Path]] = [
            (training.method, training.folder)
            for name in self.cfgs
            for training in self.trainings
            if training.method == name and (name, training.seed) in done
        ]
        draw_comparison(self.root / 'comparison.png', metric, split, reported, read_groups(named))
        if newest_test(self.root / TEACHER)[0] is not None:
            named.append((TEACHER, self.root / TEACHER))
        command = ['python', 'tools/analysis_tools/report.py', *(f'{name}={shorten_path(run)}' for name, run in named)]
        out = self.root / 'report'
        write_report(named, out, [*command, '-o', str(shorten_path(out))], notes)

    def _write_best(self, best: str, best_values: Dict[int, float], metric: str, split: str) -> None:
        file, folder = self.root / 'best.py', shorten_path(self.root)
        file.write_text(f'# {best}: the highest {metric} on val\n{config_text(self.cfgs[best])}', 'utf-8')
        if self.schedule == 1:
            seed = max(best_values, key=best_values.get)
            (training,) = (t for t in self.trainings if (t.method, t.seed) == (best, seed))
            config, checkpoint, steps = shorten_path(training.config), shorten_path(training.checkpoint), []
        else:
            config, checkpoint = f'{folder}/best.py', f'work_dirs/best/{_end_of(self.cfgs[best])}.pth'
            steps = [f'python tools/train.py {config}']
        if best != BASELINE:
            steps.append(
                f'python tools/model_converters/export_student.py {config} {checkpoint} student.pth '
                '--config-out student.py'
            )
        files = {
            f'{folder}/table.md': 'this table; results.jsonl has all metrics of all runs',
            f'{folder}/comparison.png': f'{metric} on {split} with intervals',
            f'{folder}/report/report.html': 'curves, metrics, configs',
            f'{folder}/best.py': f'config of {best} with the schedule of the student',
        }
        width = max(map(len, files))
        self.say('\n' + '\n'.join(f'{name:{width}}  {what}' for name, what in files.items()))
        if steps:
            self.say('\nTo go on with the best method:\n  ' + '\n  '.join(steps))


def _end_of(cfg: Config) -> str:
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
        weights=[f'{pair} {weight if weight == "auto" else f"{weight:g}"}' for pair, weight in weights.items()],
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


def _parsed(line: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError:  # an incomplete line of a killed run
        return {}
    return record if isinstance(record, dict) else {}


def _metrics(record: dict) -> dict:
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key not in NO_METRICS}
    return {key: value for key, value in numbers.items() if value != NO_OBJECTS}


def _main_metric(records: Sequence[dict], metric: Optional[str]) -> Optional[str]:
    """Return the metric to compare.

    Raises:
        ValueError: If no record has ``metric``.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    if metric is not None and names and metric not in names:
        raise ValueError(f"There is no metric '{metric}'; the nearest are {closest_names(metric, names)}.")
    main = [name for name in names if MAIN_METRIC.fullmatch(name)]
    return metric or next(iter(main or names), None)


def read_failure(log: Path) -> str:
    """Return the reason why a run failed, from the end of its log."""
    text = log.read_text('utf-8', errors='replace')[-20_000:]
    if NO_SPACE in text or shutil.disk_usage(log.parent).free < 2**20:
        return NO_SPACE.lower()
    errors = ERROR_LINE.findall(text)
    if not errors:
        return f'ended without an error message, perhaps out of memory; see {shorten_path(log)}'
    return INTERRUPTED if errors[-1].startswith('KeyboardInterrupt') else errors[-1].removeprefix('Error: ')[:300]


def _why(reason: str) -> str:
    return reason if reason in (NO_RESULT, INTERRUPTED) else f'failed: {reason.rstrip(".")}'
