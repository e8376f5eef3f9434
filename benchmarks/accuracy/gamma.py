"""Read and draw how gamma changes during training.

DiffKD blends noise into the student's features. Gamma is the share of the features, and 1 - gamma is the share of the
noise.
"""

from pathlib import Path
from typing import Dict, List, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmdiffkd.visualization.palette import GRID
from mmdiffkd.visualization.runs import read_run

COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00')


def read_gamma(run: Path) -> Dict[str, List[float]]:
    """Return the values of gamma that a run logged, by log key. The dict is empty if the run logged no gamma."""
    logs = read_run(run)
    keys = {key: None for record in logs.train.values() for key in record if '.gamma' in key}
    return {key: [round(value, 4) for _, value in sorted(logs.logged(key).items())] for key in keys}


def draw_gamma(seeds: Sequence[Dict[str, List[float]]], path: Path) -> None:
    """Draw how gamma changes during training, with one line per level.

    Each line is the mean over the seeds, and the band around the line is the range of the seeds.

    Args:
        seeds (list[dict[str, list[float]]]): Curves of each seed, by log key.
        path (Path): Path of the image.
    """
    figure = Figure(figsize=(7.5, 3), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    for key, color in zip(sorted(key for key in seeds[0] if key.rpartition('.')[2].isdigit()), COLORS):
        curves = [curves[key] for curves in seeds]
        x = [100 * (i + 0.5) / len(curves[0]) for i in range(len(curves[0]))]
        axes.fill_between(x, list(map(min, zip(*curves))), list(map(max, zip(*curves))), color=color, alpha=0.2, lw=0)
        axes.plot(x, [sum(ys) / len(ys) for ys in zip(*curves)], color=color, label=f'level {key.rpartition(".")[2]}')
    axes.grid(color=GRID)
    axes.set_xlabel('% of the training')
    axes.set_ylabel('gamma')
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
