"""Compare a group of runs with the group ``alone``, which trains the student without distillation, seed by seed."""

import math
import statistics
from typing import Dict, List, Optional, Sequence, Tuple

from .runs import Group, deviation

try:
    from scipy.special import stdtrit  # comes with mmdet and mmseg, but not with mmpretrain
except ImportError:
    stdtrit = None

BASELINE = 'alone'
Values = Dict[str, Dict[int, float]]  # a metric by method and seed


def baseline_of(groups: Sequence[Group]) -> Optional[Group]:
    """Return the group named ``alone``; None if there is no such group, or no group to compare with it."""
    return next((group for group in groups if group.name == BASELINE and len(groups) > 1), None)


def difference(group: Group, baseline: Group, metric: str) -> Optional[Tuple[float, Optional[float]]]:
    """Return the mean difference of a metric to the baseline, and the half width of its 95% interval.

    The seeds of both groups are paired by their order, if the groups have the same number of seeds and every seed has
    the metric. Otherwise, the difference of the means is returned, without an interval.

    Args:
        group (Group): Runs of one setup.
        baseline (Group): Runs of the setup to subtract.
        metric (str): Name of the metric.

    Returns:
        tuple[float, float | None], optional: Mean and half width, in the unit of the metric. The half width is None if
            fewer than two seeds are paired, or if scipy is not installed. The result is None if a group does not have
            the metric.
    """
    pairs = _paired(group, baseline, metric)
    if not pairs:
        means = [found.spread(lambda run: run.result(metric)) for found in (group, baseline)]
        return (means[0][0] - means[1][0], None) if all(means) else None
    return confidence([value - other for value, other in pairs])


def confidence(differences: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Return the mean of paired differences, and the half width of its 95% interval (Student's t).

    Args:
        differences (list[float]): One difference per seed.

    Returns:
        tuple[float, float | None]: Mean and half width. The half width is None for a single difference, or if scipy is
            not installed, and NaN if a difference is not finite.
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2 or stdtrit is None:
        return mean, None
    return mean, float(stdtrit(count - 1, 0.975)) * deviation(differences) / math.sqrt(count)


def paired(values: Dict[int, float], others: Dict[int, float]) -> List[float]:
    """Return ``values`` minus ``others`` for each seed that is in both."""
    return [values[seed] - others[seed] for seed in sorted(values) if seed in others]


def _paired(group: Group, baseline: Group, metric: str) -> Sequence[Tuple[float, float]]:
    """Return the values of paired seeds; an empty list if the seeds cannot be paired."""
    values, others = ([run.result(metric) for run in found.runs] for found in (group, baseline))
    if len(values) != len(others) or None in values + others:
        return []
    return list(zip(values, others))
