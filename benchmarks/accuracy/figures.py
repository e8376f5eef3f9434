"""Draw charts of the results: gains of the methods, and gamma over training."""

import math
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from matplotlib.backends.backend_agg import FigureCanvasAgg  # mmengine requires matplotlib
from matplotlib.figure import Figure

BAR_COLOR, GRID_COLOR = '#0072b2', '#e3e8ec'
LEVEL_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00')


def draw_bars(gains: Dict[str, Tuple[float, Optional[float]]], label: str, path: Path) -> None:
    """Draw one bar per method, with its confidence interval.

    Args:
        gains (dict[str, tuple[float, float | None]]): Mean gain and half the width of its confidence interval, by
            method. The half width is None if there is no interval.
        label (str): Label of the horizontal axis.
        path (Path): Path of the image.
    """
    figure, axes = _figure(7.5, 0.9 + 0.32 * len(gains))
    means, halves = zip(*gains.values())
    halves = [math.nan if half is None else half for half in halves]
    axes.barh(list(gains), means, xerr=halves, color=BAR_COLOR, height=0.62, error_kw=dict(capsize=3, lw=1.2))
    axes.axvline(0, color='black', lw=0.8)
    axes.grid(axis='x', color=GRID_COLOR)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, dpi=150)


def draw_gamma(seeds: Sequence[Dict[str, List[float]]], path: Path) -> None:
    """Draw gamma over training, with one line per level.

    Each line is the mean of the seeds, and the band around the line is the range of the seeds.

    Args:
        seeds (list[dict[str, list[float]]]): Curves of each seed, by log key.
        path (Path): Path of the image.
    """
    figure, axes = _figure(7.5, 3)
    for key, color in zip(sorted(key for key in seeds[0] if key.rpartition('.')[2].isdigit()), LEVEL_COLORS):
        curves = [curves[key] for curves in seeds]
        x = [100 * (i + 0.5) / len(curves[0]) for i in range(len(curves[0]))]
        axes.fill_between(x, list(map(min, zip(*curves))), list(map(max, zip(*curves))), color=color, alpha=0.2, lw=0)
        axes.plot(x, [sum(ys) / len(ys) for ys in zip(*curves)], color=color, label=f'level {key.rpartition(".")[2]}')
    axes.grid(color=GRID_COLOR)
    axes.set_xlabel('% of the training')
    axes.set_ylabel('gamma')
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes
