"""Access to the distiller and the optimizer of a runner."""

from typing import Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.optim import Optimizer

from mmdiffkd.models import DiffKDDistiller


def get_distiller(runner: Runner) -> Optional[DiffKDDistiller]:
    """Return the distiller of a runner, without wrappers such as DDP; None if the model is not a distiller."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model if isinstance(model, DiffKDDistiller) else None


def require_distiller(runner: Runner, hook: Hook) -> DiffKDDistiller:
    """Return the distiller of a runner.

    Raises:
        ValueError: If the model is not a distiller.
    """
    model = get_distiller(runner)
    if model is None:
        raise ValueError(
            f'{type(hook).__name__} needs a DiffKDDistiller, but the model is a {type(runner.model).__name__}.'
        )
    return model


def require_optimizer(runner: Runner, hook: Hook) -> Optimizer:
    """Return the torch optimizer of a runner.

    Raises:
        ValueError: If there are several optimizers, or the optimizer is not a torch optimizer, as with DeepSpeed.
    """
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f'{type(hook).__name__} needs a single torch optimizer, but {type(runner.optim_wrapper).__name__} has '
            f'{"several or none" if optimizer is None else "a " + type(optimizer).__name__}; remove the hook.'
        )
    return optimizer
