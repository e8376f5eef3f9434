"""Table and conclusion of a comparison. Differences between methods are those of runs with the same seed."""

import math
import statistics
from typing import Dict, List, Optional, Sequence

from mmdiffkd.visualization.curves import digits
from mmdiffkd.visualization.differences import BASELINE, Values, confidence, paired
from mmdiffkd.visualization.runs import deviation

DASH = '–'


def best_method(values: Values, without: Sequence[str] = ()) -> Optional[str]:
    """Return the method with the highest mean among those with the most seeds; None if there are no results."""
    found = {
        method: list(numbers.values())
        for method, numbers in values.items()
        if numbers and method not in without and all(map(math.isfinite, numbers.values()))
    }
    most = max(map(len, found.values()), default=0)
    means = {method: statistics.fmean(numbers) for method, numbers in found.items() if len(numbers) == most}
    return max(means, key=means.get, default=None)


def mean_text(numbers: Sequence[float], places: int) -> str:
    """Format mean and standard deviation (n - 1) with ``places`` decimals."""
    if not numbers:
        return DASH
    mean = f'{statistics.fmean(numbers):.{places}f}'
    return mean if len(numbers) < 2 else f'{mean} ± {deviation(numbers):.{places}f}'


def difference_text(differences: Sequence[float], places: int) -> str:
    """Format mean and 95% confidence interval of paired differences with ``places`` decimals."""
    if not differences:
        return DASH
    mean, half = confidence(differences)
    return f'{mean:+.{places}f}' + ('' if half is None else f' ({_interval(mean, half, places)})')


def _interval(mean: float, half: float, places: int) -> str:
    return f'{mean - half:+.{places}f} to {mean + half:+.{places}f}'


def comparison_rows(
    metric: str,
    values: Dict[str, Values],
    costs: Dict[str, dict],
    reasons: Dict[str, str],
    reference: Optional[str] = None,
    places: Optional[int] = None,
) -> List[Dict[str, str]]:
    """Return one table row per method.

    Args:
        metric (str): Name of the metric.
        values (dict[str, dict]): Metric by split, method and seed. Results are reported on the last split. The best
            other method is chosen on the first split.
        costs (dict[str, dict]): ``time``, ``memory`` (MiB) and ``gmacs`` (added multiply-adds in units of 1e9) by
            method. Unknown values are missing or None.
        reasons (dict[str, str]): Why methods have no result, by method.
        reference (str, optional): Method to compare with, besides the student alone. Defaults to the best other method.
        places (int, optional): Number of decimals of the metric. Defaults to the usual number for this metric.

    Returns:
        list[dict[str, str]]: Cells by column.
    """
    (choice, *_), (*_, reported) = values.values(), values.values()
    places = digits(metric) if places is None else places
    rows = []
    for method in [*reported, *(method for method in reasons if method not in reported)]:
        own, cost = reported.get(method, {}), costs.get(method, {})
        other = reference or best_method(choice, without=(BASELINE, method))
        row = {'method': method, 'seeds': str(len(own))}
        for split, found in values.items():
            row[f'{metric} ({split})'] = mean_text(list(found.get(method, {}).values()), places)
        if not own and method in reasons:
            row[f'{metric} ({list(values)[-1]})'] = reasons[method]
        is_baseline = method == BASELINE
        row['vs. alone'] = DASH if is_baseline else difference_text(paired(own, reported.get(BASELINE, {})), places)
        is_compared = not is_baseline and other not in (None, method)
        text = difference_text(paired(own, reported.get(other, {})), places) if is_compared else DASH
        row[f'vs. {reference or "best other"}'] = text if reference or text == DASH else f'{text} {other}'
        for name, key, text in (
            ('relative time', 'time', '{:.2f}'),
            ('memory (MiB)', 'memory', '{:.0f}'),
            ('added multiply-adds (G)', 'gmacs', '{:.3g}'),
        ):
            row[name] = DASH if cost.get(key) is None else text.format(cost[key])
        rows.append(row)
    return rows


def conclude(metric: str, values: Dict[str, Values]) -> str:
    """Return the conclusion that the confidence intervals support. Arguments: see :func:`comparison_rows`."""
    (choice, *_), (*_, reported) = values.values(), values.values()
    split, best = list(values)[-1], best_method(choice)
    if best is None:
        return 'There are no results yet.'
    chosen = '' if len(values) > 1 else f' The best method was chosen on {split} as well, which favors it.'
    if len(reported.get(best, {})) < 2:
        return f'One seed cannot rank methods. {best} has the highest {metric} on {list(values)[0]}.'
    others = [method for method in reported if method != best]
    found = {method: paired(reported[best], reported[method]) for method in others}
    found = {method: confidence(numbers) for method, numbers in found.items() if len(numbers) > 1}
    if any(half is None for _, half in found.values()):
        return f'{best} has the highest {metric}. There are no confidence intervals, because scipy is not installed.'
    order = sorted(found, key=lambda method: method != BASELINE)
    parts = [_compared(best, method, *found[method], metric) for method in order if _is_clear(*found[method])]
    similar = [method for method in order if not _is_clear(*found[method])]
    if similar:
        difference = 'difference' if len(similar) == 1 else 'differences'
        verb = 'is' if len(similar) == 1 else 'are'
        parts.append(f'the {difference} between {best} and {", ".join(similar)} {verb} not significant')
    return f'On {split}, {"; ".join(parts)}.{chosen}' if parts else f'There is nothing to compare {best} with.'


def compare_teacher(metric: str, teacher: Optional[float], alone: Sequence[float]) -> List[str]:
    """Compare the teacher with the student alone.

    Args:
        metric (str): Name of the metric.
        teacher (float, optional): Metric of the teacher on the validation split.
        alone (list[float]): Metric of the student alone, by seed.

    Returns:
        list[str]: A sentence with the result; an empty list if one of the metrics is missing.
    """
    if teacher is None or not alone:
        return []
    mean = statistics.fmean(alone)
    if teacher > mean:
        return [f'On val, the teacher has {metric} {teacher:.4g} and the student alone {mean:.4g}.']
    return [
        f'Warning: the teacher ({metric} {teacher:.4g} on val) is not better than the student alone ({mean:.4g}): '
        'check its weights, or choose a better teacher.'
    ]


def _is_clear(mean: float, half: float) -> bool:
    return abs(mean) > half


def _compared(method: str, other: str, mean: float, half: float, metric: str) -> str:
    where, size, places = 'above' if mean > 0 else 'below', abs(mean), digits(metric)
    interval = f'95% CI {size - half:.{places}f} to {size + half:.{places}f}'
    return f'{method} is {where} {other} by {size:.{places}f} {metric} ({interval})'


def aligned_markdown(rows: Sequence[Dict[str, str]]) -> str:
    """Format rows as a Markdown table with aligned columns, with the keys of the first row as header."""
    lines = [list(rows[0]), *([row[key].replace('|', '/') for key in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join(f'| {" | ".join(cell.ljust(width) for cell, width in zip(line, widths))} |' for line in lines)
