"""Draw charts of runs. Each chart is a separate small picture, so that a page can arrange them for any screen."""

import io
import math
import statistics
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from matplotlib.axes import Axes  # comes with mmengine
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .palette import COLORS, GRID, INK, REFERENCE, SOFT, STYLES
from .runs import Group, Run, Series, deviation

DPI = 200
LARGE, SMALL = (3.9, 2.4), (2.3, 1.65)  # inches; LARGE excludes the legend
LEGEND_ROW = 0.19  # height of a row of the legend in inches
FONT, FONT_SMALL = 8, 7.5
LONGEST = 44  # maximum length of a name in a legend
MARKED = 15  # lines with at most this many points have markers
LOG_RANGE = 30  # use a log scale if the maximum exceeds this multiple of the median


@dataclass
class Chart:
    """A rendered chart.

    Args:
        name (str): File name without ``.png``.
        text (str): Alternative text for screen readers.
        png (bytes): Content of the PNG file.
    """

    name: str
    text: str
    png: bytes


@dataclass
class Line:
    """A line of a chart: the mean over seeds by iteration, and the standard deviation if there are several seeds."""

    group: Group
    x: List[int]
    mean: List[float]
    deviation: Optional[List[float]] = None


def color(group: Group) -> str:
    """Return the color of a run, which is the same in all charts."""
    return REFERENCE if group.is_teacher else COLORS[group.index % len(COLORS)]


def style(group: Group):
    """Return the line style of a run. Runs that share a color have different styles."""
    return STYLES[group.index // len(COLORS) % len(STYLES)]


def css_style(group: Group) -> str:
    """Return the CSS border style that is closest to the line style of a run."""
    return ('solid', 'dashed', 'dotted', 'double')[group.index // len(COLORS) % len(STYLES)]


def lines_of(groups: Sequence[Group], value: Callable[[Run], Series]) -> List[Line]:
    """Return one line for each group that has the value. A line covers the iterations that all seeds logged."""
    lines = []
    for group in groups:
        found = [series for series in map(value, group.runs) if series]
        if not found:
            continue
        x = sorted(set.intersection(*map(set, found)))
        columns = [[series[i] for series in found] for i in x]
        means = [statistics.fmean(column) for column in columns]
        deviations = [deviation(column) for column in columns] if len(found) > 1 else None
        if x:
            lines.append(Line(group, x, means, deviations))
    return lines


def draw(
    name: str,
    title: str,
    label: str,
    lines: Sequence[Line],
    levels: Optional[Dict[str, float]] = None,
    small: bool = False,
    limits: Optional[Tuple[float, float]] = None,
    logarithmic: Optional[bool] = None,
) -> Optional[Chart]:
    """Draw lines over iterations.

    Args:
        name (str): File name without ``.png``.
        title (str): Title above the chart.
        label (str): Label of the vertical axis, with the unit of the values.
        lines (list[Line]): One line per run.
        levels (dict[str, float], optional): Values of horizontal reference lines for teachers, by label. Defaults to
            None.
        small (bool): Whether to draw a small chart without legend, for a row of similar charts. Defaults to False.
        limits (tuple[float, float], optional): Limits of the vertical axis. None fits them to the lines. Defaults to
            None.
        logarithmic (bool, optional): Whether the vertical axis is logarithmic. None means the result of
            :func:`wants_logarithm`. Defaults to None.

    Returns:
        Chart, optional: The chart; None if there are no lines.
    """
    if not lines:
        return None
    columns = 2 if max(len(_label(line)) for line in lines) < 24 else 1
    size = SMALL if small else (LARGE[0], LARGE[1] + LEGEND_ROW * math.ceil(len(lines) / columns))
    figure, axes = _figure(size, title, small)
    for above, line in zip(reversed(range(len(lines))), lines):
        draw_line(axes, line, small, above)
    for text, value in (levels or {}).items():
        axes.axhline(value, color=REFERENCE, linewidth=1.1, linestyle=(0, (4, 2)))
        _note(axes, f'{text} {value:.4g}', (1, value), ('axes fraction', 'data'), (-2, 3), ha='right')
    logarithmic = wants_logarithm(lines) if logarithmic is None else logarithmic
    if logarithmic:
        axes.set_yscale('log')
    if limits:
        axes.set_ylim(*limits)
    fontsize = FONT_SMALL if small else FONT
    axes.set_ylabel(label + (', log scale' if logarithmic else ''), fontsize=fontsize, color=SOFT)
    axes.set_xlabel('iteration', fontsize=fontsize, color=SOFT)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if small else 6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    if not small:
        figure.legend(
            loc='outside lower left',
            ncols=columns,
            frameon=False,
            fontsize=FONT,
            labelcolor=INK,
            handlelength=1.6,
            borderaxespad=0.2,
        )
    return Chart(name, f'{title}, by iteration. {_ends(lines, levels)}', _png(figure))


def draw_ends(
    name: str, title: str, label: str, lines: Sequence[Line], levels: Optional[Dict[str, float]] = None
) -> Optional[Chart]:
    """Draw only the last value of each run, for runs that were validated once. Arguments: see :func:`draw`."""
    if not lines:
        return None
    figure, axes = _figure((LARGE[0], max(LARGE[1], 0.9 + 0.28 * len(lines))), title, small=False)
    for row, line in enumerate(lines):
        deviation = line.deviation[-1] if line.deviation else None
        axes.errorbar(line.mean[-1], row, xerr=deviation, fmt='o', color=color(line.group), markersize=6, capsize=3)
    for text, value in (levels or {}).items():
        axes.axvline(value, color=REFERENCE, linewidth=1.1, linestyle=(0, (4, 2)))
        _note(axes, f'{text} {value:.4g}', (value, 0), ('data', 'axes fraction'), (-3, 3), ha='right')
    axes.set_yticks(range(len(lines)), [_label(line) for line in lines], color=INK)
    axes.set_ylim(len(lines) - 0.3, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel(label, fontsize=FONT, color=SOFT)
    return Chart(name, f'{title}. {_ends(lines, levels)}', _png(figure))


def common_limits(columns: Sequence[Sequence[Line]]) -> Tuple[Optional[Tuple[float, float]], bool]:
    """Return the limits of an axis that several charts share, and whether it is logarithmic."""
    lines = [line for column in columns for line in column]
    edges = [
        edge
        for line in lines
        for mean, deviation in zip(line.mean, line.deviation or [0.0] * len(line.mean))
        for edge in (mean - deviation, mean + deviation)
        if math.isfinite(edge)
    ]
    if not edges:
        return None, False
    low, high = min(edges), max(edges)
    if wants_logarithm(lines):
        positive = min(mean for line in lines for mean in line.mean if mean > 0)
        return (positive / 1.2, high * 1.2), True
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - margin, high + margin), False


def wants_logarithm(lines: Sequence[Line]) -> bool:
    """Return whether a few large values, e.g. at the start of training, would flatten the lines on a linear axis."""
    values = [value for line in lines for value in line.mean if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > LOG_RANGE * statistics.median(values)


def _figure(size: Tuple[float, float], title: str, small: bool) -> Tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=DPI, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc='left', fontsize=9 if small else 10, color=INK, fontweight='bold')
    axes.tick_params(labelsize=FONT_SMALL if small else FONT, colors=SOFT, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines['bottom'].set(visible=True, color='#aab4bc', linewidth=0.8)
    return figure, axes


def draw_line(axes: Axes, line: Line, small: bool, above: int) -> None:
    """Draw a line and the band of its deviation. ``above`` is the number of lines that are drawn over this line."""
    if line.deviation is not None:
        low, high = ([m + sign * d for m, d in zip(line.mean, line.deviation)] for sign in (-1, 1))
        axes.fill_between(line.x, low, high, color=color(line.group), alpha=0.18, linewidth=0)
    axes.plot(
        line.x,
        line.mean,
        color=color(line.group),
        linestyle=style(line.group),
        linewidth=(1.2 if small else 1.5) + min(0.35 * above, 1.4),  # edges of covered lines stay visible
        marker='o' if len(line.x) <= MARKED else None,
        markersize=2.2 if small else 3.2,
        label=_label(line),
    )


def _note(axes: Axes, text: str, at: tuple, coordinates: tuple, shift: tuple, ha: str) -> None:
    axes.annotate(
        _plain(text),
        at,
        xycoords=coordinates,
        xytext=shift,
        textcoords='offset points',
        ha=ha,
        fontsize=FONT,
        color=REFERENCE,
    )


def _plain(text: str) -> str:
    """Escape dollar signs, which matplotlib reads as math."""
    return text.replace('$', r'\$')


def _label(line: Line) -> str:
    name = line.group.name
    if len(name) > LONGEST:
        name = f'{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}'
    seeds = f' ({len(line.group.runs)} seeds)' if line.deviation is not None else ''
    return f'{" " * name.startswith("_")}{_plain(name)}{seeds}'  # legends omit labels that begin with an underscore


def _thousands(value: float, position: int) -> str:
    return f'{value / 1000:g}k' if abs(value) >= 10_000 else f'{value:.0f}'


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format='png', facecolor='white')
    return file.getvalue()


def _ends(lines: Sequence[Line], levels: Optional[Dict[str, float]]) -> str:
    """Return the last value of each line as text, for the alternative text of a chart."""
    ends = [f'{line.group.name} {line.mean[-1]:.4g} at iteration {line.x[-1]}' for line in lines]
    return f'Last values: {"; ".join(ends + [f"{text} {value:.4g}" for text, value in (levels or {}).items()])}.'
