"""What the hooks take from a runner."""

from typing import List, Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch.optim import Optimizer

from mmdiffkd.models import DiffKDDistiller


def distiller_of(runner: Runner) -> Optional[DiffKDDistiller]:
    """The distiller that a runner trains, taken out of DDP and the like; None if its model is none."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model if isinstance(model, DiffKDDistiller) else None


def required_distiller(runner: Runner, hook: Hook) -> DiffKDDistiller:
    """The distiller that a hook cannot do without.

    Raises:
        TypeError: If the model is none.
    """
    model = distiller_of(runner)
    if model is None:
        raise TypeError(
            f'{type(hook).__name__} needs a DiffKDDistiller, but the model is a {type(runner.model).__name__}.'
        )
    return model


def optimizers_of(runner: Runner) -> List[Optimizer]:
    """All optimizers of a runner."""
    wrapper = runner.optim_wrapper
    return [one.optimizer for one in (wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper])]
