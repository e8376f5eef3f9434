"""The table of a group of methods, from the JSON files of its cells."""

import json
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from scipy.stats import t as student_t

from benchmarks.accuracy.methods import GROUPS
from benchmarks.measure import markdown

TITLES = dict(deeppcb='DeepPCB', camvid='CamVid')
NAMES = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'}
PERCENT = ('coco/bbox_mAP', 'coco/bbox_mAP_50')  # given between 0 and 1


def cell_file(folder: Path, method: str, seed: int) -> Path:
    """Where a cell writes what came of it."""
    return folder / f'{"".join(c if c.isalnum() else "_" for c in method)}-{seed}.json'


def values(folder: Path, method: str, seeds: Sequence[int], metric: str) -> List[float]:
    """A metric of the test split in percent, by seed; of cells that have a result."""
    files = [cell_file(folder, method, seed) for seed in seeds]
    return [read(file, metric) for file in files if file.exists()]


def read(file: Path, metric: str) -> float:
    return json.loads(file.read_text())['test'][metric] * (100 if metric in PERCENT else 1)


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    mean = f'{statistics.mean(numbers):.1f}'
    return mean if len(numbers) < 2 else f'{mean} ± {statistics.stdev(numbers):.1f}'


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences, and its 95% interval by Student's t."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f'{mean:+.1f}'
    half = student_t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return f'{mean:+.1f} ({mean - half:+.1f} ... {mean + half:+.1f})'


def rows_of(folder: Path, group: str, seeds: Sequence[int], metrics: Sequence[str]) -> List[dict]:
    """A row for every method of which all seeds are there."""
    found = {method: {metric: values(folder, method, seeds, metric) for metric in metrics} for method in GROUPS[group]}
    found = {method: numbers for method, numbers in found.items() if len(numbers[metrics[0]]) == len(seeds)}
    first = {method: numbers[metrics[0]] for method, numbers in found.items()}
    file = costs_file(folder, group)
    costs = json.loads(file.read_text())['methods'] if file.exists() else {}
    rows = []
    for method, numbers in found.items():
        row = {'method': method, **{NAMES.get(metric, metric): spread(values) for metric, values in numbers.items()}}
        for base in ('alone', _rival(group, first)):
            if base is not None:
                row[f'difference to {base}'] = _difference(first, method, base)
        if costs:
            row['time'] = f'{costs[method]["time"]:.2f}'
            row['memory, MiB'] = f'{costs[method]["peak_mib"]:.0f}'
        rows.append(row)
    return rows


def costs_file(folder: Path, group: str) -> Path:
    """Where the costs of a group are written."""
    return folder / f'costs-{group}.json'


def _rival(group: str, first: Dict[str, List[float]]) -> Optional[str]:
    """What methods are compared with beside the student alone: DiffKD for its cheaper recipes, else the best other."""
    others = [method for method in first if method != 'alone' and 'diffkd' not in method]
    if group == 'recipes':
        return 'diffkd' if 'diffkd' in first else None
    return max(others, key=lambda method: statistics.mean(first[method]), default=None)


def _difference(first: Dict[str, List[float]], method: str, base: str) -> str:
    if base not in first or method in ('alone', base):
        return ''
    return interval([a - b for a, b in zip(first[method], first[base])])


def write_page(name: str, group: str, seeds: Sequence[int], results: Path, metrics: Sequence[str]) -> None:
    """Print the table, and write it beside the results."""
    folder = results / name
    rows = rows_of(folder, group, seeds, metrics)
    if not rows:
        return
    table = markdown(rows)
    print(table)
    teacher = ', '.join(f'{NAMES.get(m, m)} {read(folder / "teacher.json", m):.1f}' for m in metrics)
    costs = json.loads(costs_file(folder, group).read_text())
    text = [
        f'# {TITLES[name]}: {group}',
        f'Test split, {len(seeds)} seeds ({", ".join(map(str, seeds))}): mean and standard deviation. Differences are '
        f'in {NAMES.get(metrics[0], metrics[0])}, paired by seed, with their 95% interval. The teacher: {teacher}. '
        'Time of a training step against the student alone, and the most memory that it takes beyond weights, '
        'optimizer and images.',
        f'```shell\npython -m benchmarks.accuracy.run {name} {group} --seeds {" ".join(map(str, seeds))}\n```',
        f'{costs["machine"]}; {costs["versions"]}.',
        table,
    ]
    (results / f'{name}-{group}.md').write_text('\n\n'.join(text) + '\n')
