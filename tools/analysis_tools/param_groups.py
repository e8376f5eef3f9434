"""Compare the optimizer settings of a student's parameters without and with distillation."""

import argparse
import contextlib
import io
import sys
from collections import Counter
from typing import Dict, Optional, Tuple

from mmengine.config import ConfigDict, DictAction
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdiffkd.apis import build_distiller, build_model
from mmdiffkd.cli import exit_on_mistake, own_process, quiet_packages, without_gc
from mmdiffkd.engine.checkpoint import PREFIX

Setting = Tuple[float, float]  # learning rate and weight decay
ROW = '{:<8} {:>11} {:>8} {:>12} {:>12} {:>12} {:>12}'
NAMED = 5  # maximum number of parameters to name in the output


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='distillation config; the checkpoint of its teacher is not needed')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    MMLogger.get_instance('param_groups', log_level='ERROR')  # optimizer constructors log every parameter
    with exit_on_mistake(), quiet_packages(), without_gc():
        cfg, distilled = build_distiller(args.config, args.cfg_options)
        alone = build_model(cfg, cfg.model.student)
        before, after = param_settings(alone, cfg.optim_wrapper), param_settings(distilled, cfg.optim_wrapper)

    constructor = cfg.optim_wrapper.get('constructor', 'DefaultOptimWrapperConstructor')
    base_lr = cfg.optim_wrapper.optimizer.get('lr', '(default of the optimizer)')
    print(f'Student: {type(alone).__name__}. Optimizer constructor: {constructor}. Base learning rate: {base_lr}.')
    print('Parameters are counted as tensors, elements as numbers in them. The part diffkd is the diffusion module.\n')
    print_table(alone, before, distilled, after)
    sys.exit(verdict(before, {name: value for name, value in after.items() if not name.startswith(PREFIX)}))


def param_settings(model: nn.Module, optim_wrapper_cfg: dict) -> Dict[str, Optional[Setting]]:
    """Return the optimizer settings of each parameter of a model.

    Args:
        model (nn.Module): The model.
        optim_wrapper_cfg (dict): Config of the optimizer wrapper.

    Returns:
        dict[str, tuple[float, float] or None]: Learning rate and weight decay by parameter name; None if the parameter
            is not in the optimizer.

    Raises:
        ValueError: If a parameter is in the optimizer twice or does not belong to the model.
    """
    # no other key changes the parameter groups; without `type`, this also works for AmpOptimWrapper without a GPU
    keys = ('optimizer', 'constructor', 'paramwise_cfg')
    cfg = ConfigDict({key: optim_wrapper_cfg[key] for key in keys if key in optim_wrapper_cfg})
    with contextlib.redirect_stdout(io.StringIO()):  # mmseg's optimizer constructors print text
        groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = dict.fromkeys(names.values())
    for group in groups:
        for parameter in group['params']:
            name = names.pop(id(parameter), None)
            if name is None:
                raise ValueError(
                    f'A parameter of shape {list(parameter.shape)} is in the optimizer twice or is not part of the '
                    'model; check optim_wrapper.constructor.'
                )
            settings[name] = group['lr'], group.get('weight_decay', 0.0)
    return settings


def print_table(alone: nn.Module, before: dict, distilled: nn.Module, after: dict) -> None:
    """Print parameter and element counts by learning rate and weight decay, for student and diffusion module."""
    tables = [_count(alone, before), _count(distilled, after)]
    print(f'{"":<29} {"without distillation":>25} {"with distillation":>25}')
    print(ROW.format('part', 'lr', 'decay', *['parameters', 'elements'] * 2))
    for part in ('student', 'diffkd'):
        settings = {setting for counts, _ in tables for owner, setting in counts if owner == part}
        for setting in sorted(settings, key=lambda setting: setting or ()):
            lr, decay = (f'{value:.4g}' for value in setting) if setting else ('frozen', '-')
            counts = [f'{count[part, setting]:,}' if count[part, setting] else '-' for pair in tables for count in pair]
            print(ROW.format(part, lr, decay, *counts))
    print()


def _count(model: nn.Module, settings: Dict[str, Optional[Setting]]) -> Tuple[Counter, Counter]:
    parameters, elements = Counter(), Counter()
    for name, parameter in model.named_parameters():
        group = 'diffkd' if name.startswith(PREFIX) else 'student', settings[name]
        parameters[group] += 1
        elements[group] += parameter.numel()
    return parameters, elements


def verdict(before: Dict[str, Optional[Setting]], after: Dict[str, Optional[Setting]]) -> int:
    """Print whether distillation changes the settings of student parameters. Return the exit status."""
    different = [name for name in {**before, **after} if before.get(name, 'absent') != after.get(name, 'absent')]
    if not different:
        print(f'Distillation does not change the optimizer settings of the {len(before)} student parameters.')
        return 0
    shown = [f'{name} ({_text(before, name)} alone, {_text(after, name)} distilled)' for name in different[:NAMED]]
    more = ', ...' if len(different) > NAMED else ''
    print(
        f'Distillation changes the optimizer settings of {len(different)} of {len(before)} student parameters; check '
        f'optim_wrapper.constructor and paramwise_cfg: {", ".join(shown)}{more}'
    )
    return 1


def _text(settings: Dict[str, Optional[Setting]], name: str) -> str:
    if name not in settings:
        return 'absent'
    return 'lr {:.4g} and weight decay {:.4g}'.format(*settings[name]) if settings[name] else 'frozen'


if __name__ == '__main__':
    own_process()
    main()
