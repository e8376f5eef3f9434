"""The table of a group of methods, from the JSON files of its runs."""

import json
import math
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from scipy.stats import t as student_t

from benchmarks.accuracy.figures import draw_bars, draw_gamma
from benchmarks.accuracy.groups import BASELINES, CHOICES, base_of, runs_of
from benchmarks.measure import markdown

TITLES = {
    'deeppcb': 'DeepPCB',
    'camvid': 'CamVid',
    'deeppcb-longer': 'DeepPCB, three times as long',
    'camvid-longer': 'CamVid, three times as long',
}
SPLITS = dict(test='Test', val='Validation')
NAMES = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'}
PERCENT = ('coco/bbox_mAP', 'coco/bbox_mAP_50')  # given between 0 and 1


def run_file(folder: Path, method: str, seed: int) -> Path:
    """Where a run writes what came of it."""
    return folder / f'{"".join(c if c.isalnum() else "_" for c in method)}-{seed}.json'


def teacher_file(results: Path, name: str) -> Path:
    """Where the metrics of a set's teacher are written; a longer set has the teacher of its base."""
    return results / base_of(name) / 'teacher.json'


def values(folder: Path, method: str, seeds: Sequence[int], metric: str, split: str = 'test') -> Dict[int, float]:
    """A metric of a split in percent, by seed; of runs that have a result."""
    files = {seed: run_file(folder, method, seed) for seed in seeds}
    return {seed: read(file, metric, split) for seed, file in files.items() if file.exists()}


def read(file: Path, metric: str, split: str = 'test') -> float:
    """A metric of a split in percent."""
    return json.loads(file.read_text())[split][metric] * (100 if metric in PERCENT else 1)


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = f'{statistics.mean(numbers):.1f}'
    return mean if len(numbers) < 2 else f'{mean} ± {statistics.stdev(numbers):.1f}'


def confidence(differences: Sequence[float]) -> Tuple[float, float]:
    """Mean of paired differences, and half of its 95% interval by Student's t; NaN for one difference."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.nan
    return mean, student_t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5


def confidence_text(differences: Sequence[float]) -> str:
    """Mean and 95% interval; of one seed the difference itself."""
    mean, half = confidence(differences)
    return f'{mean:+.1f} ({mean - half:+.1f} ... {mean + half:+.1f})' if len(differences) > 1 else f'{mean:+.1f}'


def trained(folder: Path, runs: Dict[str, List[int]], metrics: Sequence[str], split: str = 'test'):
    """The metrics of every method with the seeds that are there, ``{method: {metric: {seed: value}}}``."""
    found = {
        method: {metric: values(folder, method, seeds, metric, split) for metric in metrics}
        for method, seeds in runs.items()
    }
    return {method: numbers for method, numbers in found.items() if numbers[metrics[0]]}


def rows_of(found: Dict[str, Dict[str, Dict[int, float]]], group: str, costs: Dict[str, dict]) -> List[dict]:
    """A row for every method that was trained.

    Args:
        found (dict): What :func:`trained` returns.
        group (str): The methods are of this one.
        costs (dict[str, dict]): What an iteration of every method costs; nothing if that was not measured.
    """
    first = {method: next(iter(numbers.values())) for method, numbers in found.items()}
    differ = len(set(map(len, first.values()))) > 1
    rows = []
    for method, numbers in found.items():
        row = {'method': method, **({'seeds': len(first[method])} if differ else {})}
        row.update({NAMES.get(metric, metric): spread(list(values.values())) for metric, values in numbers.items()})
        for base in ('alone', BASELINES.get(group)):
            if base in first:
                differences = paired(first[method], first[base])
                row[f'difference to {base}'] = '' if method in ('alone', base) else confidence_text(differences)
        if costs:
            cost = costs.get(method)
            row['time'] = f'{cost["time"]:.2f}' if cost else ''
            row['memory, MiB'] = f'{cost["peak_mib"]:.0f}' if cost else ''
        rows.append(row)
    return rows


def costs_file(folder: Path, group: str) -> Path:
    """Where the costs of a group are written."""
    return folder / f'costs-{group}.json'


def paired(ours: Dict[int, float], theirs: Dict[int, float]) -> List[float]:
    """The differences of the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _check_teachers(folder: Path, runs: Dict[str, List[int]], of_teacher: Path) -> None:
    files = [run_file(folder, method, seed) for method in runs for seed in runs[method] if method != 'alone']
    teacher = json.loads(of_teacher.read_text())['teacher']
    others = [file.name for file in files if file.exists() and json.loads(file.read_text())['teacher'] != teacher]
    if others:
        raise ValueError(
            f'{", ".join(others)} in {folder} had another teacher than that of {of_teacher}: remove them, start again.'
        )


def write_page(
    name: str, group: str, results: Path, metrics: Sequence[str], seeds: Optional[Sequence[int]] = None
) -> None:
    """Print the table; that of all seeds is written beside the results, with pictures.

    Raises:
        ValueError: If a run had another teacher than the one whose metric is given.
    """
    folder, runs = results / name, runs_of(name, group, seeds)
    of_teacher = teacher_file(results, name)
    _check_teachers(folder, runs, of_teacher)
    split = 'val' if group in CHOICES else 'test'
    found = trained(folder, runs, metrics, split)
    if not found:
        return
    file = costs_file(folder, group)
    costs = json.loads(file.read_text()) if file.exists() else {}
    rows = rows_of(found, group, costs.get('methods', {}))
    table = markdown(rows)
    print(table)
    if seeds:
        return
    label, stem = NAMES.get(metrics[0], metrics[0]), f'{name}-{group}'
    teacher = ', '.join(f'{NAMES.get(m, m)} {read(of_teacher, m, split):.1f}' for m in metrics)
    found = {method: numbers[metrics[0]] for method, numbers in found.items()}
    absent = [method for method, own in runs.items() if len(found.get(method, ())) < len(own)]
    most = max(runs.values(), key=len)
    fewer = ' or the first of them' if 'seeds' in rows[0] else ''
    text = [
        f'# {TITLES[name]}: {group}',
        f'{SPLITS[split]} split, seeds {", ".join(map(str, most))}{fewer}: mean and standard deviation. '
        f'Differences are in {label}, paired by seed, with their 95% interval. The teacher: {teacher}.'
        if len(most) > 1
        else f'{SPLITS[split]} split, seed {most[0]}. The teacher: {teacher}.',
        f'```shell\npython -m benchmarks.accuracy.run {name} {group}\n```',
    ]
    if costs:
        text.append(
            'Time of a training step against the student alone, and the most memory that it takes beyond weights, '
            f'optimizer and images: {costs["machine"]}; {costs["versions"]}.'
        )
    text.append(table)
    if absent:
        text.append(f'Not all seeds were trained of: {", ".join(f"`{method}`" for method in absent)}.')
    if len(most) > 1:
        text += _gains_picture(found, label, results, stem)
        if group == 'parts' and 'diffkd' in found:
            text += _gamma_picture([run_file(folder, 'diffkd', seed) for seed in found['diffkd']], results, stem)
    (results / f'{stem}.md').write_text('\n\n'.join(text) + '\n')


def _gains_picture(found: Dict[str, Dict[int, float]], metric: str, results: Path, stem: str) -> List[str]:
    """Draw what methods gain; returns the lines that show it."""
    alone = found.get('alone', {})
    differences = {method: paired(numbers, alone) for method, numbers in found.items() if method != 'alone'}
    gains = {method: confidence(numbers) for method, numbers in differences.items() if numbers}
    if not gains:
        return []
    draw_bars(gains, f'{metric} above the student alone, 95% interval', results / f'{stem}.png')
    few = '' if all(len(numbers) > 1 for numbers in differences.values()) else '; one seed has none'
    return [f'![{metric} above the student alone, with intervals{few}]({stem}.png)']


def _gamma_picture(files: Sequence[Path], results: Path, stem: str) -> List[str]:
    """Draw gamma over training; returns the lines that show it."""
    draw_gamma([json.loads(file.read_text())['gamma'] for file in files], results / f'{stem}-gamma.png')
    return [
        'What gamma of DiffKD does over training, by level; the band is the range of the seeds:',
        f'![Gamma over training]({stem}-gamma.png)',
    ]
