"""Write sections with results of the presets, one section for each data set of the accuracy benchmarks."""

import json
import statistics
import textwrap
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

from benchmarks.measure import markdown
from mmdiffkd.apis import list_presets
from mmdiffkd.visualization.differences import BASELINE, confidence

FOLDER = Path(__file__).parent.parent / 'docs' / 'accuracy'
Scores = Dict[str, Dict[int, float]]  # by method and seed
FEWEST = 3  # a data set gets a section if at least this many presets have results on it


class ResultSet(NamedTuple):
    """Models and metric of the results on a data set.

    Attributes:
        models (str): Student and teacher, as a sentence without the period.
        metric (str): Name of the metric in the file of results.
        column (str): Name of the metric in tables.
        factor (float): Factor that values of the metric are multiplied by in tables.
    """

    models: str
    metric: str
    column: str
    factor: float


SETS = {
    'DeepPCB': ResultSet(
        'Student and teacher are RetinaNet-R18. The student has an eighth of the usual width. The teacher has half of '
        'the usual width in the backbone, and a quarter in FPN and head',
        'coco/bbox_mAP',
        'AP',
        100,
    ),
    'CamVid': ResultSet(
        'The student is DeepLabV3-R18 with a quarter of the usual width, and the teacher DeepLabV3-R18 with half of it',
        'mIoU',
        'mIoU',
        1,
    ),
}


def results_sections(costs: Dict[str, Dict[str, str]], folder: Path = FOLDER) -> str:
    """Return one section for each data set that has results of at least ``FEWEST`` presets.

    Args:
        costs (dict[str, dict[str, str]]): Time of an iteration relative to the student alone, by preset and data set.
        folder (Path): Folder with a file of results per data set, such as ``camvid.jsonl``.
    """
    found = {}
    for name, settings in SETS.items():
        file = folder / f'{name.lower()}.jsonl'
        if file.exists():
            found[name] = read_scores(file.read_text('utf-8'), settings)
    sections = [
        section(name, val, test, {method: times.get(name, '–') for method, times in costs.items()})
        for name, (val, test) in found.items()
        if len(test.keys() - {BASELINE}) >= FEWEST and BASELINE in test
    ]
    return '\n\n'.join(sections)


def read_scores(text: str, settings: ResultSet) -> Tuple[Scores, Scores]:
    """Read the scores of the student alone and of the presets, if they have at least two seeds.

    Args:
        text (str): JSON lines, as in ``results.jsonl`` of a comparison.
        settings (ResultSet): Settings of the data set, which name the metric.

    Returns:
        tuple[dict, dict]: Scores on the validation split and on the test split. If there are results with several
        teachers, only the teacher with the most results counts.
    """
    methods = {BASELINE, *list_presets()}
    runs = [line for line in map(json.loads, text.splitlines()) if line['arm'] in methods and 'val' in line]
    by_teacher: Dict[str, List[dict]] = {}
    for teacher in {run['teacher'] for run in runs} - {None}:
        # runs of the student alone (the baseline) have teacher None, so they count for every teacher
        by_teacher[teacher] = [run for run in runs if run['teacher'] in (teacher, None)]

    def size(own: List[dict]) -> Tuple[int, int]:
        seeds = Counter(run['arm'] for run in own)
        return sum(count > 1 for count in seeds.values()), len(own)

    chosen = max(by_teacher.values(), key=size, default=[])
    splits: Tuple[Scores, Scores] = ({}, {})
    for run in chosen:
        for split, scores in zip(('val', 'test'), splits):
            # mmdet leaves out the metric if there are no detections
            value = settings.factor * run[split].get(settings.metric, 0.0)
            scores.setdefault(run['arm'], {})[run['seed']] = value
    val, test = ({method: own for method, own in scores.items() if len(own) > 1} for scores in splits)
    return val, test


def section(name: str, val: Scores, test: Scores, costs: Dict[str, str]) -> str:
    """Return the section of a data set: heading, conclusion, and a table with the best method in the first row.

    The table leaves out seeds without a run of the student alone, because the differences leave them out, too.
    """
    settings, rows = SETS[name], []
    shown = {}
    for method, scores in test.items():
        paired = [score for seed, score in scores.items() if seed in test[BASELINE]]
        shown[method] = paired if len(paired) > 1 else list(scores.values())
    for method in sorted(shown, key=lambda method: -statistics.fmean(shown[method])):
        numbers = shown[method]
        row = {
            'method': method if method == BASELINE else f'[`{method}`](../configure/presets/{method}.md)',
            'seeds': str(len(numbers)),
            f'{settings.column} (test)': f'{statistics.fmean(numbers):.1f} ± {statistics.stdev(numbers):.1f}',
            'difference to alone (95% CI)': '–',
        }
        if method != BASELINE:
            mean, half = difference(test[method], test[BASELINE])
            row['difference to alone (95% CI)'] = f'{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})'
        if costs:
            row['time'] = '1.00' if method == BASELINE else costs.get(method, '–')
        rows.append(row)
    conditions = f'{settings.models}. The student starts from random weights and trains in a short schedule.'
    text = f'{conditions} {conclusion(val, test, settings.column)}'
    note = (
        'A difference uses only the seeds of its row. If the row has fewer seeds than the row `alone`, the difference '
        'therefore deviates from the difference of the two means.'
    )
    return '\n\n'.join([f'### {name}', textwrap.fill(text, 120), markdown(rows), textwrap.fill(note, 120)])


def conclusion(val: Scores, test: Scores, column: str) -> str:
    """Return a text that names the best preset on the validation split, and the presets with similar test scores.

    A preset is similar if its test scores do not differ significantly from those of the best preset. If no preset is
    similar, the text says so.
    """
    presets = [method for method in val if method != BASELINE]
    most = max(len(val[method]) for method in presets)
    best = max(
        (method for method in presets if len(val[method]) == most),
        key=lambda method: statistics.fmean(val[method].values()),
    )
    similar = []
    for method in presets:
        mean, half = difference(test[best], test[method]) if method != best else (1, 0)
        if abs(mean) <= half:
            similar.append(f'`{method}`')
    text = f'`{best}` has the highest {column} on the validation split. On the test split, '
    if not similar:
        others = ' and '.join(f'`{method}`' for method in presets if method != best)
        return f'{text}`{best}` differs significantly from {others}.'
    return f'{text}the difference between `{best}` and {", ".join(similar)} is not significant.'


def difference(scores: Dict[int, float], others: Dict[int, float]) -> Tuple[float, float]:
    """Return the mean difference between runs with the same seed, and half the width of its 95% confidence interval.

    If fewer than two seeds are in both arguments, return the difference of the two means, and an infinite width.
    """
    pairs = [scores[seed] - others[seed] for seed in scores if seed in others]
    if len(pairs) < 2:
        return statistics.fmean(scores.values()) - statistics.fmean(others.values()), float('inf')
    mean, half = confidence(pairs)
    return mean, float('inf') if half is None else half
