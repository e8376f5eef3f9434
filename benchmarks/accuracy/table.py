"""Write the table and the page of a group of methods from the JSON files of its runs."""

import json
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from benchmarks.accuracy.figures import draw_bars, draw_gamma
from benchmarks.accuracy.groups import BASELINES, CHOICES, base_of, runs_of
from benchmarks.measure import markdown
from mmdiffkd.visualization.differences import confidence

TITLES = {
    'deeppcb': 'DeepPCB',
    'camvid': 'CamVid',
    'deeppcb-longer': 'DeepPCB, three times as long',
    'camvid-longer': 'CamVid, three times as long',
}
SPLITS = dict(test='test', val='validation')
NAMES = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'}
PERCENT = ('coco/bbox_mAP', 'coco/bbox_mAP_50')  # mmdet reports these metrics between 0 and 1


def run_file(folder: Path, method: str, seed: int) -> Path:
    """Return the path of a run's result."""
    return folder / f'{"".join(c if c.isalnum() else "_" for c in method)}-{seed}.json'


def teacher_file(results: Path, name: str) -> Path:
    """Return the path of the teacher's result. A longer training shares the teacher of its data set."""
    return results / base_of(name) / 'teacher.json'


def values(folder: Path, method: str, seeds: Sequence[int], metric: str, split: str = 'test') -> Dict[int, float]:
    """Return a metric of a split by seed, in percent. Seeds without a result are left out."""
    files = {seed: run_file(folder, method, seed) for seed in seeds}
    return {seed: read(file, metric, split) for seed, file in files.items() if file.exists()}


def read(file: Path, metric: str, split: str = 'test') -> float:
    """Read a metric of a split, in percent."""
    return json.loads(file.read_text('utf-8'))[split][metric] * (100 if metric in PERCENT else 1)


def spread(numbers: Sequence[float]) -> str:
    """Format mean and standard deviation."""
    mean = f'{statistics.mean(numbers):.1f}'
    return mean if len(numbers) < 2 else f'{mean} ± {statistics.stdev(numbers):.1f}'


def confidence_text(differences: Sequence[float]) -> str:
    """Format mean and 95% interval, or a single difference."""
    mean, half = confidence(differences)
    return f'{mean:+.1f}' if half is None else f'{mean:+.1f} ({mean - half:+.1f} ... {mean + half:+.1f})'


def trained(folder: Path, runs: Dict[str, List[int]], metrics: Sequence[str], split: str = 'test'):
    """Read the metrics of all methods that have results, as ``{method: {metric: {seed: value}}}``."""
    found = {
        method: {metric: values(folder, method, seeds, metric, split) for metric in metrics}
        for method, seeds in runs.items()
    }
    return {method: numbers for method, numbers in found.items() if numbers[metrics[0]]}


def rows_of(found: Dict[str, Dict[str, Dict[int, float]]], group: str, costs: Dict[str, dict]) -> List[dict]:
    """Return one table row per method.

    Args:
        found (dict): Output of :func:`trained`.
        group (str): Group of the methods.
        costs (dict[str, dict]): Cost of an iteration by method; empty if not measured.
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
    """Return the path of the file with the costs of a group."""
    return folder / f'costs-{group}.json'


def paired(numbers: Dict[int, float], baseline: Dict[int, float]) -> List[float]:
    """Return the differences between a method and a baseline, for the seeds that both have."""
    return [numbers[seed] - baseline[seed] for seed in numbers if seed in baseline]


def _check_teachers(folder: Path, runs: Dict[str, List[int]], teacher_result: Path) -> None:
    files = [run_file(folder, method, seed) for method in runs for seed in runs[method] if method != 'alone']
    teacher = json.loads(teacher_result.read_text('utf-8'))['teacher']
    mismatched = [
        file.name for file in files if file.exists() and json.loads(file.read_text('utf-8'))['teacher'] != teacher
    ]
    if mismatched:
        raise ValueError(
            f'{", ".join(mismatched)} in {folder} were distilled from a different teacher than the one in '
            f'{teacher_result}. Remove these results and start again.'
        )


def write_page(
    name: str, group: str, results: Path, metrics: Sequence[str], seeds: Optional[Sequence[int]] = None
) -> None:
    """Print the table of a group. Without ``seeds``, also write a page with the table and charts next to the results.

    Raises:
        ValueError: If a run was distilled from a different teacher than the teacher of the results.
    """
    folder, runs = results / name, runs_of(name, group, seeds)
    teacher_result = teacher_file(results, name)
    _check_teachers(folder, runs, teacher_result)
    split = 'val' if group in CHOICES else 'test'
    found = trained(folder, runs, metrics, split)
    if not found:
        return
    file = costs_file(folder, group)
    costs = json.loads(file.read_text('utf-8')) if file.exists() else {}
    rows = rows_of(found, group, costs.get('methods', {}))
    table = markdown(rows)
    print(table)
    if seeds:
        return
    label, stem = NAMES.get(metrics[0], metrics[0]), f'{name}-{group}'
    teacher = ', '.join(f'{NAMES.get(m, m)} {read(teacher_result, m, split):.1f}' for m in metrics)
    found = {method: numbers[metrics[0]] for method, numbers in found.items()}
    incomplete = [method for method, own in runs.items() if len(found.get(method, ())) < len(own)]
    most = max(runs.values(), key=len)
    fewer = ' (fewer for some methods)' if 'seeds' in rows[0] else ''
    text = [
        f'# {TITLES[name]}: {group}',
        f'Results on the {SPLITS[split]} split with seeds {", ".join(map(str, most))}{fewer}. Each metric is the mean '
        f'over the seeds with its standard deviation. Each difference is the mean difference in {label} between runs '
        f'with the same seed, with its 95% confidence interval. The teacher has {teacher}.'
        if len(most) > 1
        else f'Results on the {SPLITS[split]} split with seed {most[0]}. The teacher has {teacher}.',
        '[All measured tables](../results/tables.md#method-names) explains the names of the methods.',
        f'```shell\npython -m benchmarks.accuracy.run {name} {group}\n```',
    ]
    if costs:
        text.append(
            'The column "time" is the time of a training step relative to a step of the student alone. The column '
            '"memory, MiB" is the peak memory of a training step, without weights, optimizer state and images. Time '
            f'and memory were measured on: {costs["machine"]}; {costs["versions"]}.'
        )
    text.append(table)
    if incomplete:
        text.append(f'Methods with missing seeds: {", ".join(f"`{method}`" for method in incomplete)}.')
    if len(most) > 1:
        text += _gains_picture(found, label, results, stem)
        if group == 'parts' and 'diffkd' in found:
            text += _gamma_picture([run_file(folder, 'diffkd', seed) for seed in found['diffkd']], results, stem)
    (results / f'{stem}.md').write_text('\n\n'.join(text) + '\n', encoding='utf-8')


def _gains_picture(found: Dict[str, Dict[int, float]], metric: str, results: Path, stem: str) -> List[str]:
    """Draw the gain of every method; return the Markdown lines that show the chart."""
    alone = found.get('alone', {})
    differences = {method: paired(numbers, alone) for method, numbers in found.items() if method != 'alone'}
    gains = {method: confidence(numbers) for method, numbers in differences.items() if numbers}
    if not gains:
        return []
    draw_bars(gains, f'{metric} above the student alone, 95% interval', results / f'{stem}.png')
    note = '' if all(len(numbers) > 1 for numbers in differences.values()) else ' (none for a single seed)'
    return [f'![Gain in {metric} over the student alone, by method, with intervals{note}]({stem}.png)']


def _gamma_picture(files: Sequence[Path], results: Path, stem: str) -> List[str]:
    """Draw gamma over training; return the Markdown lines that show the chart."""
    draw_gamma([json.loads(file.read_text('utf-8'))['gamma'] for file in files], results / f'{stem}-gamma.png')
    return [
        'Gamma of DiffKD during training. Each line is the mean over the seeds for one level, and the band around the '
        'line is the range of the seeds:',
        f'![Gamma of each level during training]({stem}-gamma.png)',
    ]
