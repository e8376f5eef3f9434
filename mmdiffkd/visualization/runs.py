"""Runs as they are compared: every start of a run joined, and runs of one name together as seeds of one thing."""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from mmdiffkd.engine.checkpoint import PREFIX

from .logs import NO_METRICS, DamagedLogError, Log, read_log

PICTURE = re.compile(
    re.escape(PREFIX) + r'(?P<pair>\w+)\.(?P<level>\d+)(?P<steps>\.steps)?_(?P<iteration>\d+)\.png',
)
# what a data set is known by; other metrics of the same validation are in the long table
MAIN_METRIC = re.compile(r'.*(\bmAP|_mAP|bbox_AP|segm_AP|mIoU|top1|PQ)')
Series = Dict[int, float]  # values by iteration


@dataclass
class Picture:
    """What ``DiffKDVisualizationHook`` drew in an iteration."""

    path: Path
    pair: str
    level: int
    steps: bool
    iteration: int


@dataclass
class Run:
    """One run, with all its starts.

    Args:
        folder (Path): Its work dir.
        starts (list[str]): Folders of its starts, named after the time.
        train, val (dict[int, dict]): Records by iteration.
        teacher, test (dict[str, float]): Metrics, where they were measured.
        pictures (list[Picture]): Of its distillation.
        config (str): The config of the last start.
        versions (dict[str, str]): Of the software, in the last start.
        notes (list[str]): What the reader should know of its logs.
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
        """A value of the training records."""
        return {i: float(record[key]) for i, record in self.train.items() if _is_number(record.get(key))}

    def own_losses(self) -> List[str]:
        """The student's own losses, as the log names them.

        ``loss`` is the sum of all, or, in classifiers of mmpretrain, the only one.
        """
        names = {key: None for record in self.train.values() for key in record if 'loss' in key}
        own = [name for name in names if not name.startswith(PREFIX)]
        return [name for name in own if name != 'loss'] or own

    def own_loss(self) -> Series:
        """The sum of the student's own losses."""
        names = self.own_losses()
        return {
            i: sum(record[name] for name in names if _is_number(record.get(name)))
            for i, record in self.train.items()
            if any(_is_number(record.get(name)) for name in names)
        }

    def metric(self, name: str) -> Series:
        """A metric of the validations."""
        return {i: record[name] for i, record in self.val.items() if name in record}

    @property
    def seconds(self) -> Optional[float]:
        """Of an iteration, in the median."""
        times = self.logged('time')
        return statistics.median(times.values()) if times else None

    @property
    def memory(self) -> Optional[float]:
        """Peak of the accelerator's memory in MiB."""
        return max(self.logged('memory').values(), default=None)


@dataclass
class Group:
    """Runs of one name, seeds of one thing."""

    name: str
    runs: List[Run]
    index: int  # tells colour and line style

    @property
    def is_teacher(self) -> bool:
        return self.name == 'teacher'

    def spread(self, value: Callable[[Run], Optional[float]]) -> Optional[Tuple[float, Optional[float]]]:
        """Mean and standard deviation (n-1) over the runs that have the value; the latter None of one run."""
        values = [v for v in map(value, self.runs) if v is not None]
        if not values:
            return None
        return statistics.fmean(values), deviation(values) if len(values) > 1 else None


def read_groups(named: Sequence[Tuple[Optional[str], Path]]) -> List[Group]:
    """Read the runs, and put those of one name together.

    Args:
        named (list[tuple[str | None, Path]]): Names, where they were given, and work dirs.

    Returns:
        list[Group]: In the order of their first runs.

    Raises:
        ValueError: If a folder is given twice, or its logs cannot be read.
        FileNotFoundError: If there is no such folder, or it has no logs.
    """
    folders = [folder.resolve() for _, folder in named]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f'{folder} is given twice.')
    short = [folder.name for (name, _), folder in zip(named, folders) if name is None]
    together: Dict[str, List[Run]] = {}
    for (name, given), folder in zip(named, folders):
        if name is None:  # folders of one name are not seeds, unless one says so
            name = folder.name if short.count(folder.name) == 1 else str(given)
        together.setdefault(name, []).append(read_run(given))
    return [Group(name, runs, index) for index, (name, runs) in enumerate(together.items())]


def read_run(folder: Path) -> Run:
    """Read all starts of a run. Where a later one repeats iterations, it is the one that counts."""
    run = Run(folder)
    for log in _logs(folder, run.notes):
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
    run.test = _test(folder)
    skipped = run.logged('diffkd.skipped')
    if skipped and max(skipped.values()):
        run.notes.append(f'{folder.name}: {max(skipped.values()):.0f} iterations were skipped, being not finite.')
    return run


def deviation(values: Sequence[float]) -> float:
    """Standard deviation (n-1); NaN where not all values are finite, which ``statistics`` cannot do."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def metrics_of(group: Group) -> List[str]:
    """Names of the metrics that its validations logged."""
    return list({name: None for run in group.runs for record in run.val.values() for name in record})


def main_metrics(groups: Iterable[Group]) -> List[str]:
    """The metrics to compare: those that data sets are known by, else the first of each group."""
    names = {name: None for group in groups for name in metrics_of(group)}
    known = [name for name in names if MAIN_METRIC.fullmatch(name)]
    without = [group for group in groups if not set(known) & set(metrics_of(group))]
    return list({name: None for name in [*known, *(n for g in without for n in metrics_of(g)[:1])]})


def last(series: Series) -> Optional[float]:
    """The value of the last iteration."""
    return series[max(series)] if series else None


def best(name: str, series: Series) -> Optional[float]:
    """The highest value, of losses the lowest."""
    values = [value for value in series.values() if not math.isnan(value)]
    return (min if 'loss' in name else max)(values, default=None)


def _starts(folder: Path) -> List[Path]:
    """Folders of the starts of a run that logged something, the oldest first."""
    if not folder.is_dir():
        raise FileNotFoundError(f'There is no folder {folder}.')
    starts = sorted(file.parent.parent for file in folder.glob('*/vis_data/scalars.json'))
    if starts:
        return starts
    if (folder / 'vis_data' / 'scalars.json').is_file():
        raise FileNotFoundError(f'{folder} is one start of a run: give the work dir that it is in, {folder.parent}.')
    below = sorted(file.parent.parent.parent for file in folder.glob('*/*/vis_data/scalars.json'))
    if below:
        raise FileNotFoundError(f'{folder} is no work dir, but has some: give {", ".join(map(str, below[:3]))}.')
    if list(folder.glob('*.log.json')):
        raise FileNotFoundError(f'{folder} has logs of OpenMMLab before MMEngine (*.log.json), which are not read.')
    raise FileNotFoundError(
        f"{folder} has no logs, */vis_data/scalars.json: the config's vis_backends need dict(type='LocalVisBackend')."
    )


def _logs(folder: Path, notes: List[str]) -> List[Log]:
    """The starts that can be read; notes say which cannot, such as one that was killed in its first line."""
    logs, errors = [], []
    for start in _starts(folder):
        try:
            logs.append(read_log(start))
        except DamagedLogError as error:
            errors.append(error)
            notes.append(f'{folder.name}/{start.name}: left out, its log has no readable record.')
    if not logs:
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
    return file.read_text(errors='replace') if file.is_file() else ''


def _notes(folder: Path, log: Log) -> List[str]:
    if not log.unreadable:
        return []
    lines = 'line of the log' if log.unreadable == 1 else 'lines of the log'
    return [f'{folder.name}/{log.folder.name}: {log.unreadable} damaged {lines} left out.']


def _test(folder: Path) -> Dict[str, float]:
    """The metrics of the newest test that was written into the work dir."""
    for file in sorted(folder.glob('*/*.json'), reverse=True):
        try:
            content = json.loads(file.read_text(errors='replace'))
        except ValueError:
            continue
        if file.stem == file.parent.name and isinstance(content, dict):
            return {key: value for key, value in content.items() if _is_number(value) and key not in NO_METRICS}
    return {}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
