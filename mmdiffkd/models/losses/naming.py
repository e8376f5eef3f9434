"""Names of losses in the log: ``diffkd.<pair>.<term>``, and ``diffkd.<pair>.<term>.<level>`` for one level."""

import re
from typing import Dict, List, Sequence, Union

import torch
from torch import Tensor

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.utils.check_config import in_key

LOSS = 'loss_'
PAIR_KEY_RE = re.compile(re.escape(PREFIX) + r'(?P<pair>\w+)\.(?P<term>\w+)')
LEVEL_KEY_RE = re.compile(re.escape(PREFIX) + r'(?P<pair>\w+)\.(?P<term>\w+)\.(?P<level>\d+)')


def name_losses(
    pair: str, outputs: Sequence, levels: Sequence[int], weight: float = 1.0, auxiliary: Sequence[str] = ()
) -> Dict[str, Tensor]:
    """Rename the losses and logged values of a neck to their names in the log.

    The names of per-level values do not contain ``loss``, because mmengine adds every value with ``loss`` in its name
    to the total loss.

    Args:
        pair (str): Name of the pair.
        outputs (list[DistillOutput]): One per level, with ``losses`` and ``logs``.
        levels (list[int]): Level numbers of ``outputs``.
        weight (float): Factor for the losses that train the student. Defaults to 1.
        auxiliary (list[str]): Names of the losses that train only the neck. ``weight`` does not scale these losses.
            Defaults to ``()``.

    Returns:
        dict[str, Tensor]: Losses summed over levels and logged values averaged over levels. With several levels, also
        the detached values of each level.

    Raises:
        ValueError: If a loss has a name without the prefix ``loss_``, or a logged value has a name with ``loss`` in it.
    """
    losses, logs = [], []
    for output in outputs:
        with in_key(f'distill.{pair}.neck'):
            check_names(output)
        is_scaled = {name: weight != 1 and name not in auxiliary for name in output.losses}
        losses.append({name: value * weight if is_scaled[name] else value for name, value in output.losses.items()})
        logs.append({name: value.detach().float().mean() for name, value in output.logs.items()})
    named = {}
    for name in _union(losses):
        named[f'{PREFIX}{pair}.{name}'] = sum(values[name] for values in losses if name in values)
    for name in _union(logs):
        found = [values[name] for values in logs if name in values]
        named[f'{PREFIX}{pair}.{name}'] = sum(found) / len(found)
    if len(outputs) > 1:
        for level, level_losses, level_logs in zip(levels, losses, logs):
            for name, value in level_losses.items():
                named[f'{PREFIX}{pair}.{name[len(LOSS) :]}.{level}'] = value.detach()
            for name, value in level_logs.items():
                named[f'{PREFIX}{pair}.{name}.{level}'] = value
    return named


def sum_losses(losses: Dict[str, Union[Tensor, Sequence[Tensor]]]) -> Tensor:
    """Sum the losses of a model as mmengine does: the means of all values with ``loss`` in their names."""
    values = [value for name, value in losses.items() if 'loss' in name]
    return torch.stack(
        [tensor.mean() for value in values for tensor in ([value] if isinstance(value, Tensor) else value)]
    ).sum()


def check_names(output) -> None:
    """Check the names of a neck's losses and logged values.

    Raises:
        ValueError: If a loss has a name without the prefix ``loss_``, or a logged value has a name with ``loss`` in it.
    """
    for name in output.losses:
        if not name.startswith(LOSS):
            raise ValueError(f"the neck returns the loss '{name}': rename it to '{LOSS}{name}'.")
    for name in output.logs:
        if 'loss' in name:
            raise ValueError(
                f"the neck logs '{name}': a value with 'loss' in its name would be optimized; return it in losses, or "
                'rename it.'
            )


def _union(dicts: Sequence[dict]) -> List[str]:
    return list({name: None for values in dicts for name in values})


def non_finite_names(log_vars: Dict[str, Tensor]) -> List[str]:
    """List the losses that are not finite. If only some levels are affected, their numbers follow in parentheses.

    Args:
        log_vars (dict[str, Tensor]): Values to log.

    Returns:
        list[str]: For example ``['loss_cls', 'diffkd.fpn.loss_kd (levels 0, 2)']``.
    """
    bad = [name for name, value in log_vars.items() if not value.isfinite().all()]
    levels: Dict[str, List[str]] = {}
    for match in filter(None, map(LEVEL_KEY_RE.fullmatch, bad)):
        levels.setdefault(f'{PREFIX}{match["pair"]}.loss_{match["term"]}', []).append(match['level'])
    losses = [name for name in bad if 'loss' in name and name != 'loss']
    return [
        f'{name} (level{"s" * (len(levels[name]) > 1)} {", ".join(levels[name])})' if name in levels else name
        for name in losses
    ]
