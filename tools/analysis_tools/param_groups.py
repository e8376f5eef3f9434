"""Compare what the optimizer does to every parameter of a student, without and with distillation."""

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
from mmdiffkd.cli import exit_on_mistake, own_process, without_gc
from mmdiffkd.engine.checkpoint import PREFIX

Setting = Tuple[float, float]  # learning rate and weight decay
ROW = '{:<8} {:>11} {:>8} {:>12} {:>12} {:>12} {:>12}'
NAMED = 5  # parameters that differ


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation run; the weights of its teacher are not needed')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override settings of the config: key=value ...'
    )
    return parser.parse_args()


def main():
    args = parse_args()
    MMLogger.get_instance('param_groups', log_level='ERROR')  # the constructors log every single parameter
    with exit_on_mistake(), without_gc():
        cfg, distilled = build_distiller(args.config, args.cfg_options)
        alone = build_model(cfg, cfg.model.student)
        before, after = param_settings(alone, cfg.optim_wrapper), param_settings(distilled, cfg.optim_wrapper)

    constructor = cfg.optim_wrapper.get('constructor', 'DefaultOptimWrapperConstructor')
    base_lr = cfg.optim_wrapper.optimizer.get('lr', "the optimizer's own")
    print(f'{type(alone).__name__}, {constructor}, base lr {base_lr}')
    print_table(alone, before, distilled, after)
    sys.exit(verdict(before, {name: value for name, value in after.items() if not name.startswith(PREFIX)}))


def param_settings(model: nn.Module, optim_wrapper_cfg: dict) -> Dict[str, Optional[Setting]]:
    """What the optimizer of a config does to each parameter of a model.

    Args:
        model (nn.Module): The model.
        optim_wrapper_cfg (dict): Config of its optimizer wrapper.

    Returns:
        dict[str, tuple or None]: Learning rate and weight decay by name; None for what is not in the optimizer.

    Raises:
        ValueError: If a parameter is in the optimizer more than once, or is none of the model's.
    """
    # no other key matters to the groups, and the wrapper for mixed precision refuses machines without a GPU
    keys = ('optimizer', 'constructor', 'paramwise_cfg')
    cfg = ConfigDict({key: optim_wrapper_cfg[key] for key in keys if key in optim_wrapper_cfg})
    with contextlib.redirect_stdout(io.StringIO()):  # mmseg's constructors print
        groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = dict.fromkeys(names.values())
    for group in groups:
        for parameter in group['params']:
            name = names.pop(id(parameter), None)
            if name is None:
                raise ValueError(
                    f'A parameter of shape {list(parameter.shape)} is in the optimizer twice or by mistake.'
                )
            settings[name] = group['lr'], group.get('weight_decay', 0.0)
    return settings


def print_table(alone: nn.Module, before: dict, distilled: nn.Module, after: dict) -> None:
    """Parameters and their elements by learning rate and weight decay: the student's, then the diffusion module's."""
    tables = [_count(alone, before), _count(distilled, after)]
    print(f'{"":<29} {"without distillation":>25} {"with distillation":>25}')
    print(ROW.format('', 'lr', 'decay', *['parameters', 'elements'] * 2))
    for part in ('student', 'diffkd'):
        settings = {setting for counts, _ in tables for owner, setting in counts if owner == part}
        for setting in sorted(settings, key=lambda setting: setting or ()):
            lr, decay = (f'{value:.4g}' for value in setting) if setting else ('frozen', '-')
            counts = [f'{count[part, setting]:,}' if count[part, setting] else '-' for pair in tables for count in pair]
            print(ROW.format(part, lr, decay, *counts))


def _count(model: nn.Module, settings: Dict[str, Optional[Setting]]) -> Tuple[Counter, Counter]:
    parameters, elements = Counter(), Counter()
    for name, parameter in model.named_parameters():
        group = 'diffkd' if name.startswith(PREFIX) else 'student', settings[name]
        parameters[group] += 1
        elements[group] += parameter.numel()
    return parameters, elements


def verdict(before: Dict[str, Optional[Setting]], after: Dict[str, Optional[Setting]]) -> int:
    """Say whether each parameter of the student is treated as it is alone; the exit status."""
    different = [name for name in {**before, **after} if before.get(name, 'absent') != after.get(name, 'absent')]
    if not different:
        print(f'the same for all {len(before)} parameters of the student')
        return 0
    shown = [f'{name} ({_text(before, name)} alone, {_text(after, name)} distilled)' for name in different[:NAMED]]
    more = ', ...' if len(different) > NAMED else ''
    print(f'not the same for {len(different)} of {len(before)} parameters of the student: {", ".join(shown)}{more}')
    return 1


def _text(settings: Dict[str, Optional[Setting]], name: str) -> str:
    if name not in settings:
        return 'absent'
    return 'lr {:.4g} and weight decay {:.4g}'.format(*settings[name]) if settings[name] else 'frozen'


if __name__ == '__main__':
    own_process()
    main()
