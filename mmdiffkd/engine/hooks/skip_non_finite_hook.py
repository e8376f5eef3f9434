from logging import WARNING

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.registry import HOOKS


@HOOKS.register_module()
class SkipNonFiniteHook(Hook):
    """Leave out iterations whose loss is not finite, instead of stopping there.

    All ranks leave out the same iterations. The optimizer makes no step at all, so neither momentum nor weight decay
    moves a weight; with gradient accumulation the batch adds nothing and the others make the step. The batch has been
    through the forward pass, though: the running statistics of BatchNorm have seen it.
    """

    def before_train(self, runner: Runner) -> None:
        """Switch the distiller from stopping to skipping.

        Raises:
            TypeError: If the model is no distiller.
        """
        model = _unwrapped(runner)
        if not isinstance(model, DiffKDDistiller):
            raise TypeError(f'SkipNonFiniteHook needs a DiffKDDistiller, but the model is a {type(model).__name__}.')
        model.skip_non_finite = True
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        for one in wrappers:
            one.optimizer.register_step_pre_hook(lambda optimizer, *args: self._drop_step(model, optimizer))

    @staticmethod
    def _drop_step(model: DiffKDDistiller, optimizer) -> None:
        # optimizers pass over parameters without a gradient; those of other batches are kept
        if model.skipped_iteration and not any(
            p.grad is not None and p.grad.any() for group in optimizer.param_groups for p in group['params']
        ):
            optimizer.zero_grad(set_to_none=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Report a skipped iteration."""
        model = _unwrapped(runner)
        if model.skipped_iteration:
            bad = ', '.join(model.skipped_iteration)
            print_log(f'Iteration {runner.iter} was skipped: not finite were {bad}.', logger='current', level=WARNING)


def _unwrapped(runner: Runner) -> BaseModel:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
