"""The table of a group of methods, from the JSON files of its cells."""

import json
import statistics
from pathlib import Path
from typing import List, Sequence

from scipy.stats import t as student_t

from benchmarks.accuracy.methods import GROUPS
from benchmarks.measure import markdown

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
    rows = []
    alone = values(folder, 'alone', seeds, metrics[0])
    for method in GROUPS[group]:
        found = {metric: values(folder, method, seeds, metric) for metric in metrics}
        if len(found[metrics[0]]) < len(seeds):
            continue
        row = {'method': method}
        for metric, numbers in found.items():
            row[NAMES.get(metric, metric)] = spread(numbers)
        is_base = method == 'alone' or len(alone) < len(seeds)
        differences = [] if is_base else [a - b for a, b in zip(found[metrics[0]], alone)]
        row['difference to alone (95% interval)'] = interval(differences) if differences else ''
        rows.append(row)
    return rows


def write_page(name: str, group: str, seeds: Sequence[int], results: Path, metrics: Sequence[str]) -> None:
    """Print the table, and write it beside the results."""
    folder = results / name
    rows = rows_of(folder, group, seeds, metrics)
    if not rows:
        return
    table = markdown(rows)
    print(table)
    teacher = ', '.join(f'{NAMES.get(m, m)} {read(folder / "teacher.json", m):.1f}' for m in metrics)
    text = [
        f'# {name}: {group}',
        f'Test split, {len(seeds)} seeds ({", ".join(map(str, seeds))}): mean and standard deviation; differences are '
        f'paired by seed. The teacher: {teacher}.',
        f'```shell\npython -m benchmarks.accuracy.run {name} {group} --seeds {" ".join(map(str, seeds))}\n```',
        table,
    ]
    (results / f'{name}-{group}.md').write_text('\n\n'.join(text) + '\n')
