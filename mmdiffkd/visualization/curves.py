"""Draw the charts of the report page and arrange them in sections."""

import math
import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.models.losses.naming import LEVEL_KEY_RE, LOSS, PAIR_KEY_RE

from .charts import Chart, Line, common_limits, draw, draw_ends, lines_of
from .logs import WEIGHT
from .runs import Group, main_metrics

TERMS = {
    'kd': 'distance to teacher',
    'diffusion': 'error of predicted noise',
    'reconstruction': 'autoencoder error',
    'gamma': 'share of student feature',
}
OWN_TERMS = 8  # maximum number of charts of the student's losses; detection transformers log dozens of losses
# metrics whose values are percentages
PERCENT = re.compile(r'(aAcc|mIoU|mAcc|mDice|.*/top\d+|.*(PQ|SQ|RQ))')


@dataclass
class Section:
    """A section of the page.

    Args:
        title (str): Heading.
        text (str): Explanation of the charts.
        charts (list[Chart]): Large charts.
        rows (dict[str, list[Chart]]): Rows of small charts, by heading.
    """

    title: str
    text: str
    charts: List[Chart] = field(default_factory=list)
    rows: Dict[str, List[Chart]] = field(default_factory=dict)


def sections(groups: Sequence[Group]) -> List[Section]:
    """Draw the charts of all runs. Only the metrics of a run named ``teacher`` are drawn, unless it is the only run."""
    trained = [group for group in groups if not group.is_teacher] or list(groups)
    drawn = [_training(trained, groups), *(_pair(trained, pair) for pair in _pairs(trained))]
    return [section for section in drawn if section.charts or any(section.rows.values())]


def unit(metric: str) -> str:
    """Return the unit or range of a metric; an empty string if it is unknown."""
    if PERCENT.fullmatch(metric):
        return '%'
    return '0 – 1' if metric.startswith('coco/') else ''


def digits(metric: str) -> int:
    """Return the number of decimals to show of a metric."""
    return 2 if unit(metric) == '%' else 3


def teachers(groups: Sequence[Group], metric: str) -> Dict[str, float]:
    """Return a metric of each teacher: a run named ``teacher``, and teachers that ``TeacherCheckHook`` evaluated."""
    values = {}
    for group in groups:
        if group.is_teacher and len(groups) > 1 and (found := group.spread(lambda run: run.result(metric))):
            values['teacher' if group.is_validated else 'teacher (test)'] = found[0]
    for group in groups:
        for run in group.runs:
            value = run.teacher.get(metric)
            if value is not None and all(f'{value:.4g}' != f'{other:.4g}' for other in values.values()):
                values[f'teacher of {group.name}' if values else 'teacher'] = value
    return values


def _training(trained: Sequence[Group], groups: Sequence[Group]) -> Section:
    section = Section(
        'Validation and training',
        "Metrics on the validation set, and the student's own losses, without the distillation losses. Losses are "
        "averages over mmengine's smoothing window (10 iterations by default). Gray dashed lines are the metrics of "
        'teachers.',
    )
    charts = [_validation(trained, groups, metric) for metric in main_metrics(groups)]
    charts.append(draw('loss', "Student's own loss", 'loss', lines_of(trained, lambda run: run.own_loss())))
    section.charts = [chart for chart in charts if chart]
    terms = list({name: None for group in trained for run in group.runs for name in run.own_losses()})
    shown = terms[:OWN_TERMS] if len(terms) > 1 else []
    row = [draw(_file('loss', term), term, 'loss', _logged(trained, term), small=True) for term in shown]
    row.append(draw('lr', 'learning rate', 'lr', _logged(trained, 'lr'), small=True, logarithmic=False))
    weight, title = _logged(trained, WEIGHT), 'distillation weight'
    row.append(draw('distillation-weight', title, 'factor of loss_kd', weight, small=True, limits=(0, 1.05)))
    left_out = f' (first {OWN_TERMS} of {len(terms)})' if len(terms) > OWN_TERMS else ''
    heading = f"Terms of the student's own loss{left_out} and settings" if shown else 'Settings'
    section.rows[heading] = [chart for chart in row if chart]
    return section


def _validation(trained: Sequence[Group], groups: Sequence[Group], metric: str) -> Optional[Chart]:
    lines = lines_of(trained, lambda run: run.metric(metric))
    label = f'{metric}, {unit(metric)}' if unit(metric) else metric
    arguments = _file('validation', metric), 'Validation', label, lines, teachers(groups, metric)
    if all(len(line.x) == 1 for line in lines):
        return draw_ends(*arguments)
    return draw(*arguments, logarithmic=False)


def _pair(groups: Sequence[Group], pair: str) -> Section:
    levels, terms = _levels(groups, pair), _terms(groups, pair)
    text = 'Losses are multiplied by their weights, as in the total loss.'
    if 'gamma' in terms:
        text += ' Gamma is the share of the student feature when noise is blended in; at 1, no noise is added.'
    section = Section(f'Distillation: {pair}', text)
    limits = dict(gamma=_limits_of_gamma(groups, pair, levels))
    for name in terms:
        term = name[len(LOSS) :] if name.startswith(LOSS) else name
        what = TERMS.get(term, name)
        title = f'{pair}: {name}' + (', mean over levels' if term == name and levels else '')
        lines = _logged(groups, f'{PREFIX}{pair}.{name}')
        section.charts.append(draw(f'{pair}-{name}', title, what, lines, limits=limits.get(term)))
        section.rows[f'{name} per level, on the same scale'] = _by_level(groups, pair, term, levels, limits.get(term))
    section.charts = [chart for chart in section.charts if chart]
    return section


def _by_level(groups: Sequence[Group], pair: str, term: str, levels: Sequence[int], limits) -> List[Chart]:
    """Draw one small chart per level, all on the same scale."""
    columns = [_logged(groups, f'{PREFIX}{pair}.{term}.{level}') for level in levels]
    limits, logarithmic = (limits, False) if limits else common_limits(columns)
    charts = [
        draw(f'{pair}-{term}-{level}', f'level {level}', term, lines, None, True, limits, logarithmic)
        for level, lines in zip(levels, columns)
    ]
    return [chart for chart in charts if chart]


def _limits_of_gamma(groups: Sequence[Group], pair: str, levels: Sequence[int]) -> Optional[Tuple[float, float]]:
    """Return the limits of the gamma axis: the lowest gamma, rounded down to a tenth, and slightly above 1."""
    keys = [f'{PREFIX}{pair}.gamma', *(f'{PREFIX}{pair}.gamma.{level}' for level in levels)]
    low = [mean for key in keys for line in _logged(groups, key) for mean in line.mean if math.isfinite(mean)]
    return (math.floor(min(low) * 10) / 10, 1.01) if low else None


def _logged(groups: Sequence[Group], key: str) -> List[Line]:
    return lines_of(groups, lambda run: run.logged(key))


def _pairs(groups: Sequence[Group]) -> List[str]:
    matches = map(PAIR_KEY_RE.fullmatch, _keys(groups))
    return list({match['pair']: None for match in matches if match})


def _terms(groups: Sequence[Group], pair: str) -> List[str]:
    """Return the names of the values logged for a pair; the values in ``TERMS`` come first."""
    matches = map(PAIR_KEY_RE.fullmatch, _keys(groups))
    found = {match['term']: None for match in matches if match and match['pair'] == pair}
    known = [term if term == 'gamma' else f'{LOSS}{term}' for term in TERMS]
    return [*(name for name in known if name in found), *(name for name in found if name not in known)]


def _levels(groups: Sequence[Group], pair: str) -> List[int]:
    matches = map(LEVEL_KEY_RE.fullmatch, _keys(groups))
    return sorted({int(match['level']) for match in matches if match and match['pair'] == pair})


def _keys(groups: Sequence[Group]) -> List[str]:
    return list(
        {key: None for group in groups for run in group.runs for record in run.train.values() for key in record}
    )


def _file(*parts: str) -> str:
    return re.sub(r'[^\w.-]+', '_', '-'.join(parts))
