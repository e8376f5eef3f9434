"""Read runs from their logs.

The logs of all starts of a resumed run are merged. Runs with the same name form a group: one setup, trained with
several seeds.
"""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.utils import closest_names

from .logs import NO_METRICS, DamagedLogError, Log, read_log, read_versions

PICTURE = re.compile(
    re.escape(PREFIX) + r'(?P<pair>\w+)\.(?P<level>\d+)(?P<steps>\.steps)?_(?P<iteration>\d+)\.png',
)
# main metrics of common data sets; the table of all metrics lists the rest
MAIN_METRIC = re.compile(r'.*(\bmAP|_mAP|bbox_AP|segm_AP|mIoU|top1|PQ)')
NO_OBJECTS = -1.0  # value of a COCO metric if the images have no objects for it, e.g. no large objects
Series = Dict[int, float]  # values by iteration


@dataclass
class Picture:
    """A picture that ``DiffKDVisualizationHook`` drew."""

    path: Path
    pair: str
    level: int
    steps: bool
    iteration: int


@dataclass
class Run:
    """A run with all its starts. A resumed run has several starts. A checkpoint that was only tested is also a run.

    Args:
        folder (Path): Work dir.
        starts (list[str]): Folder names of the starts, which are their times.
        train, val (dict[int, dict]): Records by iteration.
        teacher, test (dict[str, float]): Metrics; empty if they were not measured.
        pictures (list[Picture]): Pictures of the distillation.
        config (str): Config of the last start.
        versions (dict[str, str]): Software versions of the last start.
        notes (list[str]): Notes on problems in the logs, to show on the page.
    """

    folder: Path
    starts: List[str] = field(default_factory=list)
    train: Dict[int, dict] = field(default_factory=dict)
    val: Dict[int, dict] = field(default_factory=dict)
    teacher: Dict[str, float] = field(default_factory=dict)
    test: Dict[str, float] = field(default_factory=dict)
    pictures: List[Picture] = field(default_factory=list)
    config: str = ''
    versions: Dict[str, str] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    @property
    def iterations(self) -> int:
        return max([*self.train, *self.val], default=0)

    def logged(self, key: str) -> Series:
        """Return the training values with the log key ``key``, by iteration."""
        return {i: float(record[key]) for i, record in self.train.items() if _is_number(record.get(key))}

    def own_losses(self) -> List[str]:
        """Return the log keys of the student's own losses.

        ``loss`` is the sum of all losses. It is left out, unless the student logs no other loss, as mmpretrain's
        classifiers do.
        """
        names = {key: None for record in self.train.values() for key in record if 'loss' in key}
        own = [name for name in names if not name.startswith(PREFIX)]
        return [name for name in own if name != 'loss'] or own

    def own_loss(self) -> Series:
        """Return the sum of the student's own losses by iteration."""
        names = self.own_losses()
        return {
            i: sum(record[name] for name in names if _is_number(record.get(name)))
            for i, record in self.train.items()
            if any(_is_number(record.get(name)) for name in names)
        }

    def metric(self, name: str) -> Series:
        """Return a validation metric by iteration. Validations on images without objects for it are left out."""
        return {i: record[name] for i, record in self.val.items() if record.get(name, NO_OBJECTS) != NO_OBJECTS}

    def result(self, name: str) -> Optional[float]:
        """Return a metric of the last validation, or of the newest test if no validation was logged."""
        return last(self.metric(name)) if self.val else self.test.get(name)

    @property
    def seconds(self) -> Optional[float]:
        """Median time of an iteration in seconds."""
        times = self.logged('time')
        return statistics.median(times.values()) if times else None

    @property
    def memory(self) -> Optional[float]:
        """Peak accelerator memory in MiB."""
        return max(self.logged('memory').values(), default=None)


@dataclass
class Group:
    """Runs with the same name: one setup, trained with several seeds."""

    name: str
    runs: List[Run]
    index: int  # selects color and line style

    @property
    def is_teacher(self) -> bool:
        return self.name == 'teacher'

    @property
    def is_validated(self) -> bool:
        return any(run.val for run in self.runs)

    def spread(self, value: Callable[[Run], Optional[float]]) -> Optional[Tuple[float, Optional[float]]]:
        """Return mean and standard deviation (n - 1) over the runs that have the value.

        The deviation is None if only one run has the value. The result is None if no run has the value.
        """
        values = [v for v in map(value, self.runs) if v is not None]
        if not values:
            return None
        return statistics.fmean(values), deviation(values) if len(values) > 1 else None


def read_groups(named: Sequence[Tuple[Optional[str], Path]]) -> List[Group]:
    """Read runs and group those with the same name.

    Args:
        named (list[tuple[str | None, Path]]): Name (or None) and work dir of each run.

    Returns:
        list[Group]: Groups in the order of their first runs.

    Raises:
        ValueError: If a work dir is given twice or its logs cannot be read.
        FileNotFoundError: If a work dir does not exist, or has neither logs nor results of a test.
    """
    folders = [folder.resolve() for _, folder in named]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f'The work dir {folder} is given twice; give it once.')
    short = [folder.name for (name, _), folder in zip(named, folders) if name is None]
    together: Dict[str, List[Run]] = {}
    for (name, given), folder in zip(named, folders):
        if name is None:  # each run without a name is its own group; if folder names are equal, use the paths
            name = folder.name if short.count(folder.name) == 1 else str(given)
        together.setdefault(name, []).append(read_run(given))
    return [Group(name, runs, index) for index, (name, runs) in enumerate(together.items())]


def read_run(folder: Path) -> Run:
    """Read all starts of a run and merge their records.

    A start replaces what earlier starts have recorded from its first iteration on.
    """
    run = Run(folder)
    tested, run.test = newest_test(folder)
    logs = _logs(folder, run.notes)
    if tested and not logs:  # the work dir of tools/test.py
        run.starts, run.config, run.versions = [tested.name], _config(tested), read_versions(tested)
    for log in logs:
        begin = min([*log.train, *log.val], default=float('inf'))
        run.train = {**_before(run.train, begin), **log.train}
        run.val = {**_before(run.val, begin), **log.val}
        run.teacher.update(log.teacher)
        pictures = {(p.pair, p.level, p.steps, p.iteration): p for p in run.pictures if p.iteration < begin}
        pictures.update({(p.pair, p.level, p.steps, p.iteration): p for p in _pictures(log.folder)})
        run.pictures = list(pictures.values())
        run.starts.append(log.folder.name)
        run.versions = log.versions or run.versions
        run.config = _config(log.folder) or run.config
        run.notes += _notes(folder, log)
    skipped = run.logged('diffkd.skipped')
    if skipped and max(skipped.values()):
        run.notes.append(f'{folder.name}: {max(skipped.values()):.0f} iterations with non-finite values were skipped.')
    return run


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation (n - 1), or NaN if a value is not finite: ``statistics`` would raise an error."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def metrics_of(group: Group) -> List[str]:
    """Return the names of all validation metrics of a group, or of its tests if no validation was logged."""
    records = [record for run in group.runs for record in run.val.values()] or [run.test for run in group.runs]
    return list({name: None for record in records for name in record})


def main_metrics(groups: Iterable[Group]) -> List[str]:
    """Return the metrics to compare: all main metrics, and the first metric of each group without main metrics."""
    names = {name: None for group in groups for name in metrics_of(group)}
    known = [name for name in names if MAIN_METRIC.fullmatch(name)]
    without = [group for group in groups if not set(known) & set(metrics_of(group))]
    return list({name: None for name in [*known, *(n for g in without for n in metrics_of(g)[:1])]})


def choose_metric(records: Iterable[dict], name: Optional[str] = None) -> Optional[str]:
    """Return the metric to compare: ``name`` if given, otherwise the first main metric or, if none, the first metric.

    The result is None if ``name`` is None and there are no metrics.

    Raises:
        ValueError: If there are metrics, but none with this name.
    """
    names = list(dict.fromkeys(metric for record in records for metric in record))
    if name is not None and names and name not in names:
        raise ValueError(f"There is no metric '{name}'; the nearest are {closest_names(name, names)}.")
    main = [metric for metric in names if MAIN_METRIC.fullmatch(metric)]
    return name or next(iter(main or names), None)


def last(series: Series) -> Optional[float]:
    """Return the value of the last iteration, or None if there are no values."""
    return series[max(series)] if series else None


def best_value(name: str, series: Series) -> Optional[float]:
    """Return the highest value, or the lowest if the metric is a loss. NaN is ignored."""
    values = [value for value in series.values() if not math.isnan(value)]
    return (min if 'loss' in name else max)(values, default=None)


def _starts(folder: Path) -> List[Path]:
    """Return the folders of all starts with logs, oldest first; an empty list if the work dir has only a test."""
    if not folder.is_dir():
        raise FileNotFoundError(f'The folder {folder} does not exist; give the work dir of a training or a test.')
    starts = _with_logs(folder)
    if starts or newest_test(folder)[0]:
        return starts
    if (folder / 'vis_data' / 'scalars.json').is_file():
        raise FileNotFoundError(f'{folder} is the folder of a single start of a run; give the work dir above it.')
    below = [path.name for path in sorted(folder.glob('*/')) if _with_logs(path) or newest_test(path)[0]]
    if below:
        listed = ', '.join(below[:3]) + (f' and {len(below) - 3} more' if len(below) > 3 else '')
        raise FileNotFoundError(f'{folder} is not a work dir, but contains work dirs; give one or more: {listed}.')
    if list(folder.glob('*.log.json')):
        raise FileNotFoundError(
            f'{folder} has only logs from before MMEngine (*.log.json), which cannot be read; test the checkpoint of '
            'the run with tools/test.py, and give the work dir of the test.'
        )
    raise FileNotFoundError(
        f'{folder} has neither training logs (*/vis_data/scalars.json) nor results of a test; train with '
        "dict(type='LocalVisBackend') in vis_backends, or give the work dir of tools/test.py."
    )


def _with_logs(folder: Path) -> List[Path]:
    return sorted(file.parent.parent for file in folder.glob('*/vis_data/scalars.json'))


def _logs(folder: Path, notes: List[str]) -> List[Log]:
    """Read the logs of all starts. A start without readable records, e.g. killed early, is skipped with a note."""
    logs, errors = [], []
    for start in _starts(folder):
        try:
            logs.append(read_log(start))
        except DamagedLogError as error:
            errors.append(error)
            notes.append(f'{folder.name}/{start.name}: left out because its log has no readable record.')
    if errors and not logs:
        raise errors[-1]
    return logs


def _before(records: Dict[int, dict], begin: float) -> Dict[int, dict]:
    return {iteration: record for iteration, record in records.items() if iteration < begin}


def _pictures(start: Path) -> List[Picture]:
    found = [(path, PICTURE.fullmatch(path.name)) for path in sorted(start.glob('vis_data/vis_image/*.png'))]
    return [
        Picture(path, match['pair'], int(match['level']), bool(match['steps']), int(match['iteration']))
        for path, match in found
        if match
    ]


def _config(start: Path) -> str:
    file = start / 'vis_data' / 'config.py'
    return file.read_text('utf-8', 'replace') if file.is_file() else ''


def _notes(folder: Path, log: Log) -> List[str]:
    if not log.unreadable:
        return []
    lines = 'line of the log was' if log.unreadable == 1 else 'lines of the log were'
    return [f'{folder.name}/{log.folder.name}: {log.unreadable} damaged {lines} left out.']


def newest_test(folder: Path) -> Tuple[Optional[Path], Dict[str, float]]:
    """Return folder and metrics of the newest test in the work dir, or None and an empty dict."""
    for file in sorted(folder.glob('*/*.json'), reverse=True):
        try:
            content = json.loads(file.read_text('utf-8', 'replace'))
        except ValueError:
            continue
        if file.stem == file.parent.name and isinstance(content, dict):
            numbers = {key: value for key, value in content.items() if _is_number(value) and key not in NO_METRICS}
            return file.parent, {key: value for key, value in numbers.items() if value != NO_OBJECTS}
    return None, {}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
