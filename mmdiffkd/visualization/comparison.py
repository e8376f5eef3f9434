"""Draw the picture of a comparison: the results of all seeds, confidence intervals, and learning curves."""

import statistics
from pathlib import Path
from typing import Dict, List, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .charts import DPI, FONT, Line, color, draw_line, lines_of
from .curves import unit
from .differences import BASELINE, Values, confidence, paired
from .palette import GRID, INK, REFERENCE, SOFT
from .runs import Group


def draw_comparison(path: Path, metric: str, split: str, reported: Values, groups: Sequence[Group]) -> None:
    """Draw the results of all seeds, the 95% intervals of the differences to the student alone, and learning curves.

    Args:
        path (Path): Path of the image.
        metric (str): Name of the metric.
        split (str): Split of the data set that the results are measured on, such as ``'test'``.
        reported (dict): Metric on this split, by method and seed.
        groups (list[Group]): Runs of the methods. Learning curves are drawn if a run was validated more than once.
    """
    lines = [line for line in lines_of(groups, lambda run: run.metric(metric)) if len(line.x) > 1]
    methods = [method for method, numbers in reported.items() if numbers]
    height = max(2.6, 1.1 + 0.32 * len(methods))
    figure = Figure(figsize=(9.2 if lines else 5.2, height), dpi=DPI, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if lines else 1, squeeze=False)[0]
    colors = {group.name: color(group) for group in groups}
    label = f'{metric} on {split}' + (f', {unit(metric)}' if unit(metric) else '')
    _draw_results(axes[0], methods, reported, colors, label)
    if lines:
        _draw_curves(axes[1], lines, metric)
    figure.savefig(path, facecolor='white')


def _draw_results(axes: Axes, methods: List[str], reported: Values, colors: Dict[str, str], label: str) -> None:
    baseline = reported.get(BASELINE, {})
    has_interval = False
    for row, method in enumerate(methods):
        numbers, ink = list(reported[method].values()), colors.get(method, INK)
        differences = paired(reported[method], baseline) if method != BASELINE else []
        half = confidence(differences)[1] if differences else None
        has_interval = has_interval or half is not None
        mean = statistics.fmean(numbers)
        axes.scatter(numbers, [row] * len(numbers), s=14, color=ink, alpha=0.45, linewidths=0)
        axes.errorbar(mean, row, xerr=half, fmt='o', color=ink, markersize=6, capsize=3)
    if baseline:
        axes.axvline(statistics.fmean(baseline.values()), color=REFERENCE, linewidth=1.1, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(methods)), methods, color=INK)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    bars = '\nbars: 95% interval of the difference to alone (dashed line)' if has_interval else ''
    _finish(axes, 'Mean and single seeds', label + bars)


def _draw_curves(axes: Axes, lines: Sequence[Line], metric: str) -> None:
    for above, line in zip(reversed(range(len(lines))), lines):
        draw_line(axes, line, False, above)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=FONT, labelcolor=INK)
    _finish(axes, f'{metric} on val', 'iteration')


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title.replace('$', r'\$'), loc='left', fontsize=10, color=INK, fontweight='bold')
    axes.set_xlabel(label.replace('$', r'\$'), fontsize=FONT, color=SOFT)
    axes.tick_params(labelsize=FONT, colors=SOFT, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
