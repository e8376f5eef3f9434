"""What the hooks take from a runner."""

from typing import Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.optim import Optimizer

from mmdiffkd.models import DiffKDDistiller


def get_distiller(runner: Runner) -> Optional[DiffKDDistiller]:
    """The distiller that a runner trains, taken out of DDP and the like; None if its model is none."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model if isinstance(model, DiffKDDistiller) else None


def require_distiller(runner: Runner, hook: Hook) -> DiffKDDistiller:
    """The distiller that a hook cannot do without.

    Raises:
        TypeError: If the model is none.
    """
    model = get_distiller(runner)
    if model is None:
        raise TypeError(
            f'{type(hook).__name__} needs a DiffKDDistiller, but the model is a {type(runner.model).__name__}.'
        )
    return model


def require_optimizer(runner: Runner, hook: Hook) -> Optimizer:
    """The torch optimizer whose steps a hook watches.

    Raises:
        TypeError: If there are several, or it is none of torch's, as with DeepSpeed.
    """
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f'{type(hook).__name__} needs one optimizer of torch, but {type(runner.optim_wrapper).__name__} has '
            f'{"several or none" if optimizer is None else "a " + type(optimizer).__name__}; leave the hook out.'
        )
    return optimizer
