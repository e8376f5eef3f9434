"""The names of losses in the log: ``diffkd.<pair>.<term>``, and ``diffkd.<pair>.<term>.<level>`` for one level."""

import re
from typing import Dict, List, Sequence

from torch import Tensor

from mmdiffkd.utils import PREFIX

from ..diffusion import DiffusionOutput

OF_A_LEVEL = re.compile(re.escape(PREFIX) + r'(?P<pair>\w+)\.(?P<term>\w+)\.(?P<level>\d+)')


def name_losses(
    pair: str, outputs: Sequence[DiffusionOutput], levels: Sequence[int], weight: float = 1.0
) -> Dict[str, Tensor]:
    """Name what a neck returns; mmengine sums up what has ``loss`` in its name, so what tells levels apart has not.

    Args:
        pair (str): Name of the pair.
        outputs (list[DiffusionOutput]): One a level.
        levels (list[int]): Their numbers.
        weight (float): Factor of ``loss_kd``. Defaults to 1.

    Returns:
        dict[str, Tensor]: Sums over levels, the mean of gamma, and where there are several levels, each one detached.
    """
    if weight != 1:
        for output in outputs:
            output.losses['loss_kd'] = output.losses['loss_kd'] * weight
    named = {}
    for name in outputs[0].losses:
        named[f'{PREFIX}{pair}.{name}'] = sum(output.losses[name] for output in outputs)
    gammas = [output.gamma.detach().mean() for output in outputs if output.gamma is not None]
    if gammas:
        named[f'{PREFIX}{pair}.gamma'] = sum(gammas) / len(gammas)
    if len(outputs) > 1:
        for level, output in zip(levels, outputs):
            for name, value in output.losses.items():
                named[f'{PREFIX}{pair}.{name[len("loss_") :]}.{level}'] = value.detach()
            if output.gamma is not None:
                named[f'{PREFIX}{pair}.gamma.{level}'] = output.gamma.detach().mean()
    return named


def non_finite_names(log_vars: Dict[str, Tensor]) -> List[str]:
    """The losses that are not finite, those of a pair with their levels.

    Args:
        log_vars (dict[str, Tensor]): What is logged.

    Returns:
        list[str]: For example ``['loss_cls', 'diffkd.fpn.loss_kd (levels 0, 2)']``.
    """
    bad = [name for name, value in log_vars.items() if not value.isfinite().all()]
    levels: Dict[str, List[str]] = {}
    for match in filter(None, map(OF_A_LEVEL.fullmatch, bad)):
        levels.setdefault(f'{PREFIX}{match["pair"]}.loss_{match["term"]}', []).append(match['level'])
    losses = [name for name in bad if 'loss' in name and name != 'loss']
    return [
        f'{name} (level{"s" * (len(levels[name]) > 1)} {", ".join(levels[name])})' if name in levels else name
        for name in losses
    ]
