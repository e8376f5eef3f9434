"""Write the report: a self-contained HTML page on one or more runs."""

import ast
import math
import re
import shlex
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import List, Optional, Sequence, Tuple

from jinja2 import Environment, PackageLoader  # a dependency of torch

import mmdiffkd

from .charts import color, css_style
from .curves import Section, digits, sections, unit
from .differences import baseline_of, difference, stdtrit
from .pictures import data_uri, panels_by_pair
from .runs import NO_OBJECTS, Group, Run, best_value, last, main_metrics, metrics_of, read_groups

MIB_IN_GIB = 1024
PAGE = 'report.html'


def write_report(
    named: Sequence[Tuple[Optional[str], Path]], out: Path, command: Sequence[str], notes: Sequence[str] = ()
) -> Path:
    """Write a page on runs, and its charts as PNG files in the same folder. They replace earlier files.

    Args:
        named (list[tuple[str | None, Path]]): Name (or None) and work dir of each run. Runs with the same name are
            seeds of one setup. A run named ``teacher`` is drawn as a reference line, and the table shows the
            differences to a run named ``alone``. A work dir of ``tools/test.py`` is also accepted; it has a test result
            and no training logs.
        out (Path): Output folder.
        command (list[str]): Command that reproduces the page, to print on it.
        notes (list[str]): Notes to show on the page, before the notes on problems in the logs. Defaults to ``()``.

    Returns:
        Path: Path of the page.

    Raises:
        FileNotFoundError: If a work dir does not exist, or has neither logs nor a test.
        ValueError: If a work dir is given twice or its logs cannot be read.
        OSError: If the folder cannot be written.
    """
    groups = read_groups(named)
    drawn = sections(groups)
    page = _environment().get_template('page.html').render(_content(groups, drawn, notes), command=shlex.join(command))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in _charts_of_page(out):
            file.unlink(missing_ok=True)
        for section in drawn:
            for chart in [*section.charts, *chain.from_iterable(section.rows.values())]:
                (out / f'{chart.name}.png').write_bytes(chart.png)
        (out / PAGE).write_text(page, encoding='utf-8')
    except OSError as error:
        raise OSError(f'{out} cannot be written: {error.strerror}. Choose another folder with -o.') from error
    return out / PAGE


def _charts_of_page(out: Path) -> List[Path]:
    """Return the charts of an earlier page, which the new page replaces. All other pictures in the folder are kept."""
    page = out / PAGE
    names = re.findall(r'data-file="([\w.-]+\.png)"', page.read_text('utf-8', 'replace')) if page.is_file() else []
    return [out / name for name in names]


def _content(groups: Sequence[Group], drawn: Sequence[Section], notes: Sequence[str]) -> dict:
    """Collect the variables of the template."""
    metrics, baseline = main_metrics(groups), baseline_of(groups)
    rows = [_row(group, metrics, baseline) for group in groups]
    runs = [(group, run) for group in groups for run in group.runs]
    pictures, missing = panels_by_pair(groups)
    final = [value for _, run in runs if run.val for value in run.val[max(run.val)].values()]
    return dict(
        groups=groups,
        runs=runs,
        metrics=metrics,
        rows=rows,
        checked=_checked_teachers(groups, metrics),
        everything=_everything(groups),
        sections=drawn,
        pictures=pictures,
        notes=[*notes, *_notes(groups), *missing],
        versions=list({name: None for _, run in runs for name in run.versions}),
        version=mmdiffkd.__version__,
        baseline=baseline,
        tested=[group.name for group in groups if metrics_of(group) and not group.is_validated],
        has_interval=any(' to ' in cells['versus'] for row in rows for cells in row['cells']),
        has_no_objects=NO_OBJECTS in final,
        has_nan=any(map(math.isnan, final)),
        has_seeds=len(runs) > len(groups),
        has_test=any(metric in run.test for _, run in runs for metric in metrics),
        has_memory=any(run.memory for _, run in runs),
        has_teacher=any(row['teacher'] for row in rows),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader('mmdiffkd.visualization', '.'), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters['uri'] = data_uri
    environment.globals.update(color=color, css_style=css_style, unit=unit)
    return environment


def _row(group: Group, metrics: Sequence[str], baseline: Optional[Group]) -> dict:
    """Return the table row of a group."""
    student, teacher = describe_models(group.runs[0].config)
    return dict(
        group=group,
        cells=[_metric_cells(group, metric, baseline) for metric in metrics],
        student=student,
        teacher=teacher,
        iterations=_cell(group, lambda run: run.iterations or None, 0),
        seconds=_cell(group, lambda run: run.seconds, 3),
        memory=_cell(group, lambda run: run.memory and run.memory / MIB_IN_GIB, 2),
    )


def _metric_cells(group: Group, metric: str, baseline: Optional[Group]) -> dict:
    values = dict(
        last=lambda run: last(run.metric(metric)),
        best=lambda run: best_value(metric, run.metric(metric)),
        test=lambda run: run.test.get(metric),
    )
    cells = {name: _cell(group, value, digits(metric)) for name, value in values.items()}
    return dict(cells, versus=_versus(group, metric, baseline))


def _versus(group: Group, metric: str, baseline: Optional[Group]) -> str:
    """Return the difference to the baseline, e.g. ``+0.031 (+0.012 to +0.050)``."""
    found = None if baseline in (None, group) else difference(group, baseline, metric)
    if found is None:
        return '–'
    (mean, half), places = found, digits(metric)
    if math.isnan(mean):
        return 'nan'
    interval = '' if half is None else f' ({mean - half:+.{places}f} to {mean + half:+.{places}f})'
    return f'{mean:+.{places}f}{interval}'


def _everything(groups: Sequence[Group]) -> List[Tuple[str, List[str]]]:
    """Return all metrics of the last validations as text, by metric. Runs without validation show their tests."""
    names = {name: None for group in groups for name in metrics_of(group)}
    return [
        (name, [_cell(group, lambda run, name=name: run.result(name), digits(name)) for group in groups])
        for name in names
    ]


def _cell(group: Group, value, places: int) -> str:
    found = group.spread(value)
    if found is None:
        return '–'
    mean, deviation = found
    is_count = places == 0 and not deviation
    return f'{mean:.{places}f}' + (f' ± {deviation:.{places}f}' if deviation is not None and not is_count else '')


def _checked_teachers(groups: Sequence[Group], metrics: Sequence[str]) -> List[Tuple[str, str]]:
    """Return the metrics of teachers measured before distillation, as text by run name."""
    found = []
    for group in groups:
        run = next((run for run in group.runs if run.teacher), None)
        values = [f'{m} {run.teacher[m]:.{digits(m)}f}' for m in metrics if m in run.teacher] if run else []
        if values:
            found.append((group.name, ', '.join(values)))
    return found


def _notes(groups: Sequence[Group]) -> List[str]:
    notes = [note for group in groups for run in group.runs for note in run.notes]
    measured = [group for group in groups if metrics_of(group)]
    without = [group.name for group in groups if not metrics_of(group)]
    if without:
        notes.append(f'No validation was logged by {", ".join(without)}; to compare metrics, set val_interval.')
    if len(measured) > 1 and not set.intersection(*(set(metrics_of(group)) for group in measured)):
        listed = '; '.join(f'{group.name} has {", ".join(metrics_of(group)[:4])}' for group in measured)
        notes.append(f'The runs have no metric in common, so their results cannot be compared: {listed}.')
    if baseline_of(groups) and any(len(group.runs) > 1 for group in groups) and stdtrit is None:
        notes.append('The differences have no 95% interval, because scipy is not installed: run pip install scipy.')
    for group in groups:
        lengths = {run.iterations for run in group.runs}
        if len(lengths) > 1:
            notes.append(
                f'The seeds of {group.name} have {min(lengths)} to {max(lengths)} iterations. Curves cover the '
                'iterations that all seeds logged; the table uses all iterations of each seed.'
            )
        if not _share_iterations(group.runs):
            notes.append(f'The seeds of {group.name} share no logged iteration, so their curves are not drawn.')
    return notes


def _share_iterations(runs: Sequence[Run]) -> bool:
    logged = [set(run.train) for run in runs if run.train]
    return not logged or bool(set.intersection(*logged))


def describe_models(config: str) -> Tuple[str, str]:
    """Describe the models of a config.

    Args:
        config (str): Text of a config that mmengine dumped.

    Returns:
        tuple[str, str]: The trained model and the teacher; empty strings if the config does not define them.
    """
    model = _setting(config, 'model')
    if not isinstance(model, dict):
        return '', ''
    teacher = model.get('teacher')
    if 'student' not in model or not isinstance(teacher, dict):
        return _architecture(model), ''
    source = teacher.get('config')
    described = PurePosixPath(source).stem if isinstance(source, str) else _architecture(source)
    return _architecture(model['student']), described


def _setting(config: str, name: str):
    """Return the value of a setting made of literals and ``dict(...)``, or None."""
    try:
        body = ast.parse(config).body
    except (SyntaxError, ValueError):  # the recorded config is damaged
        return None
    for node in body:
        if isinstance(node, ast.Assign) and [getattr(target, 'id', None) for target in node.targets] == [name]:
            return _value(node.value)
    return None


def _value(node: ast.expr):
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _architecture(model: Optional[dict]) -> str:
    """Describe a model, e.g. ``RetinaNet, ResNet-18``."""
    if isinstance(model, dict) and 'type' not in model and isinstance(model.get('model'), dict):
        model = model['model']  # the full config of a teacher
    if not isinstance(model, dict):
        return ''
    parts = [_type(model)]
    backbone = model.get('backbone')
    if isinstance(backbone, dict):
        size = next((str(backbone[key]) for key in ('depth', 'arch') if isinstance(backbone.get(key), (int, str))), '')
        parts.append('-'.join(filter(None, [_type(backbone), size])))
        if isinstance(backbone.get('base_channels'), int):
            parts.append(f'{backbone["base_channels"]} channels')
    return ', '.join(filter(None, parts))


def _type(cfg: dict) -> str:
    return str(cfg.get('type') or '').rsplit('.', 1)[-1]
