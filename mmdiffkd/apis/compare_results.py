"""Write the results of a comparison: table, picture, report, and the config of the best method."""

import statistics
from pathlib import Path
from textwrap import shorten
from typing import Dict, List, Optional, Sequence, Tuple

from mmdiffkd.cli import shorten_path
from mmdiffkd.visualization.comparison import draw_comparison
from mmdiffkd.visualization.differences import BASELINE, Values
from mmdiffkd.visualization.report import write_report
from mmdiffkd.visualization.runs import choose_metric, newest_test, read_groups

from .compare_configs import config_text
from .compare_runs import INTERRUPTED, NO_RESULT, TEACHER, ComparisonRuns, last_step
from .compare_table import aligned_markdown, best_method, compare_teacher, comparison_rows, conclude

REASON = 60  # maximum length of the reason of a failure in the table; the notes below have the whole text


def write_results(runs: ComparisonRuns, metric: Optional[str]) -> dict:
    """Write and print table, picture, report and the config of the best method.

    Args:
        runs (ComparisonRuns): The runs.
        metric (str, optional): Metric to compare. Defaults to the main metric.

    Returns:
        dict: The comparison; see :func:`mmdiffkd.apis.compare`.

    Raises:
        ValueError: If the results have no such metric.
    """
    records = runs.write_records()
    found = [record for record in records if 'failed' not in record]
    failed = [record for record in records if 'failed' in record]
    result = dict(rows=[], conclusion='There are no results yet.', results=records, best=None)
    result.update(not_applicable=runs.not_applicable, missing=[f'{r["arm"]}_seed{r["seed"]}' for r in failed])
    notes = [f'{r["arm"]}, seed {r["seed"]}: {_why(r["failed"])}.' for r in failed if r['failed'] != NO_RESULT]
    notes += _absent([(r['arm'], r['seed']) for r in failed if r['failed'] == NO_RESULT])
    notes += [f'Not applicable: {reason}' for reason in runs.reasons()]
    if not found:
        print('\n'.join([*notes, result['conclusion']]), flush=True)
        return result
    metric = choose_metric([record['val'] for record in found], metric)
    values = read_values(found, metric, ('val', 'test')[: 1 + runs.is_tested])
    means = {method: statistics.fmean(own.values()) for method, own in values['val'].items()}
    order = sorted(means, key=lambda method: (method != BASELINE, -means[method]))  # the best methods first
    values = {split: {method: own[method] for method in order} for split, own in values.items()}
    split, reported = list(values.items())[-1]
    reasons = {
        record['arm']: shorten(_why(record['failed']), REASON, placeholder=' ...') for record in reversed(failed)
    }
    rows = comparison_rows(metric, values, _costs(runs, found), reasons)
    best, conclusion = best_method(values['val']), conclude(metric, values)
    result.update(rows=rows, conclusion=conclusion, best=best)
    teacher, alone = runs.teacher_metrics().get(metric), values['val'].get(BASELINE, {})
    notes = [conclusion, *compare_teacher(metric, teacher, list(alone.values())), *notes]
    if not runs.is_tested:
        notes.append(
            'The config of the student has no separate test split, so all results are those on the validation split.'
        )
    table = aligned_markdown(rows)
    listed = '\n'.join(f'* {note}' for note in notes)
    (runs.root / 'table.md').write_text(f'{table}\n\n{listed}\n', 'utf-8')
    print(f'\n{table}\n\n{listed}', flush=True)
    _draw(runs, found, metric, split, reported, notes)
    if best is not None:
        _write_best(runs, best, values['val'][best], metric, split)
    return result


def read_values(records: Sequence[dict], metric: str, splits: Sequence[str]) -> Dict[str, Values]:
    """Return a metric by split, method and seed: 0 if it is missing, as in mmdet if there are no detections."""
    values: Dict[str, Values] = {split: {} for split in splits}
    for record in records:
        for split in splits:
            values[split].setdefault(record['arm'], {})[record['seed']] = record[split].get(metric, 0.0)
    return values


def _absent(missing: Sequence[Tuple[str, int]]) -> List[str]:
    """Return a list with a sentence on the runs without a result, grouped by seeds; an empty list if there are none."""
    seeds: Dict[str, List[int]] = {}
    for method, seed in missing:
        seeds.setdefault(method, []).append(seed)
    methods: Dict[Tuple[int, ...], List[str]] = {}
    for method, own in seeds.items():
        methods.setdefault(tuple(own), []).append(method)
    listed = [
        f'{", ".join(names)} ({"seed" if len(own) == 1 else "seeds"} {", ".join(map(str, own))})'
        for own, names in methods.items()
    ]
    return [f'No result yet: {"; ".join(listed)}.'] if listed else []


def _costs(runs: ComparisonRuns, found: Sequence[dict]) -> Dict[str, dict]:
    """Return relative time, memory and multiply-adds of each method.

    Time and memory come from timed iterations, or if there are none, from the logs of the runs.
    """
    costs = {}
    logged = {record['arm']: record for record in found}
    alone = logged.get(BASELINE) or {}
    for name in runs.cfgs:
        cost, seen = runs.state['costs'].get(name, {}), runs.state['previews'][name]
        time, memory = cost.get('time'), cost.get('peak_mib')
        record = logged.get(name)
        if time is None and record and record['seconds'] and alone.get('seconds'):
            time, memory = record['seconds'] / alone['seconds'], record['memory_mib']
        costs[name] = dict(time=time, memory=memory, gmacs=seen.get('gmacs'))
    return costs


def _draw(
    runs: ComparisonRuns, found: Sequence[dict], metric: str, split: str, reported: Values, notes: Sequence[str]
) -> None:
    done = {(record['arm'], record['seed']) for record in found}
    named: List[Tuple[Optional[str], Path]] = [
        (training.method, training.folder)
        for name in runs.cfgs
        for training in runs.trainings
        if training.method == name and (name, training.seed) in done
    ]
    draw_comparison(runs.root / 'comparison.png', metric, split, reported, read_groups(named))
    if newest_test(runs.root / TEACHER)[0] is not None:
        named.append((TEACHER, runs.root / TEACHER))
    command = ['python', 'tools/analysis_tools/report.py', *(f'{name}={shorten_path(run)}' for name, run in named)]
    out = runs.root / 'report'
    write_report(named, out, [*command, '-o', str(shorten_path(out))], notes)


def _write_best(runs: ComparisonRuns, best: str, best_values: Dict[int, float], metric: str, split: str) -> None:
    """Write ``best.py``, and print the list of files and the commands to continue with."""
    file, folder = runs.root / 'best.py', shorten_path(runs.root)
    file.write_text(f'# {best}: the highest {metric} on val\n{config_text(runs.cfgs[best])}', 'utf-8')
    if runs.schedule == 1:
        seed = max(best_values, key=best_values.get)
        (training,) = (t for t in runs.trainings if (t.method, t.seed) == (best, seed))
        config, checkpoint, steps = shorten_path(training.config), shorten_path(training.checkpoint), []
    else:
        config, checkpoint = f'{folder}/best.py', f'work_dirs/best/{last_step(runs.cfgs[best])}.pth'
        steps = [f'python tools/train.py {config}']
    if best != BASELINE:
        steps.append(
            f'python tools/model_converters/export_student.py {config} {checkpoint} student.pth --config-out student.py'
        )
    files = {
        f'{folder}/table.md': 'this table; results.jsonl has all metrics of all runs',
        f'{folder}/comparison.png': f'{metric} on {split} with intervals',
        f'{folder}/report/report.html': 'curves, metrics, configs',
        f'{folder}/best.py': f'config of {best} with the schedule of the student',
    }
    width = max(map(len, files))
    print('\n' + '\n'.join(f'{name:{width}}  {what}' for name, what in files.items()))
    if steps:
        print('\nTo continue with the best method:\n  ' + '\n  '.join(steps))


def _why(reason: str) -> str:
    return reason if reason in (NO_RESULT, INTERRUPTED) else f'failed: {reason.rstrip(".")}'
