from logging import WARNING
from typing import List, Literal, Tuple

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.optim import Optimizer

from mmdiffkd.models import DiffKDDistiller
from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.check_config import Natural, check_arguments

from .utils import get_distiller, require_distiller, require_optimizer

SCALAR = 'diffkd.skipped'  # name in the log and in the message hub


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Detect losses and gradients that are not finite, and either stop the run or skip the optimizer step.

    Without this hook, the distiller stops the run at a loss that is not finite. The hook also checks the gradients just
    before the optimizer step, and can skip the step on all ranks instead of stopping the run. A skipped step does not
    change the weights (momentum and weight decay are skipped as well) or the running statistics of BatchNorm. With
    gradient accumulation, the whole step is skipped. With fp16, the loss scaler skips steps whose gradients overflow;
    these steps are normal, and the hook does not count them.

    Args:
        policy (str): ``'raise'`` stops the run, ``'skip'`` skips the step. Defaults to ``'raise'``.
        max_consecutive_skips (int): The run stops if more steps than this are skipped in a row. Defaults to 20.

    Raises:
        ValueError: If ``policy`` is unknown.
    """

    priority = 'ABOVE_NORMAL'  # so that this hook restores the buffers before EMAHook copies them

    @check_arguments
    def __init__(self, policy: Literal['raise', 'skip'] = 'raise', max_consecutive_skips: Natural = 20):
        self.policy = policy
        self.max_consecutive_skips = max_consecutive_skips
        self._handle = None
        self._consecutive = 0
        self._causes: List[str] = []  # names of non-finite values since the last optimizer step
        # each buffer and its copy from before the iteration
        self._buffers: List[Tuple[torch.Tensor, torch.Tensor]] = []

    def before_train(self, runner: Runner) -> None:
        """Enable the checks of the distiller, and register a hook on the optimizer.

        Raises:
            ValueError: If the model is not a distiller, or the optimizer is not a single torch optimizer.
        """
        model = require_distiller(runner, self)
        model.distill_state.skip_non_finite = self.policy == 'skip'
        model.distill_state.record_tap_gradients = True
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = require_optimizer(runner, self)
        self.after_train(runner)  # remove the optimizer hook of an earlier run
        self._handle = optimizer.register_step_pre_hook(lambda *args: self._check(runner, model, optimizer, names))
        if self.policy == 'skip':
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def after_train(self, runner: Runner) -> None:
        """Remove the hook from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Copy the buffers. If the iteration is skipped, the hook restores the copies."""
        if self._buffers:
            live, saved = zip(*self._buffers)
            torch._foreach_copy_(list(saved), list(live))

    def _check(self, runner: Runner, model: DiffKDDistiller, optimizer: Optimizer, names: dict) -> None:
        """Check the values before an optimizer step. If one is not finite, raise an error or clear all gradients."""
        if getattr(optimizer, 'found_inf', None) is not None and optimizer.found_inf:
            return  # the loss scaler has set found_inf, so the fused optimizer skips the step itself
        if not (self._causes or model.distill_state.non_finite_losses):
            gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            is_finite = _all_finite(gradients)
            all_reduce(is_finite, op='min')  # sharded gradients differ between ranks
            if is_finite:
                return
            self._causes = _locate(model, optimizer, names)
            if self.policy == 'raise':
                raise FloatingPointError(
                    f'The gradient is not finite in iteration {runner.iter}: {", ".join(self._causes)}. Lower the '
                    "learning rate, or skip such steps with dict(type='mmdiffkd.NonFiniteHook', policy='skip')."
                )
        optimizer.zero_grad(set_to_none=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Log and count skipped steps, and restore the buffers.

        Raises:
            FloatingPointError: If more than ``max_consecutive_skips`` steps in a row were skipped.
        """
        losses = get_distiller(runner).distill_state.non_finite_losses
        made_a_step = runner.optim_wrapper.should_update()
        if losses or (self._causes and made_a_step):
            for live, saved in self._buffers:
                live.copy_(saved)
        self._causes += [name if made_a_step else f'{name} of iteration {runner.iter}' for name in losses]
        if not made_a_step:
            return
        causes, self._causes = ', '.join(self._causes), []
        if not causes:
            self._consecutive = 0
            return
        self._consecutive += 1
        count = runner.message_hub.get_info(SCALAR, 0) + 1
        runner.message_hub.update_info(SCALAR, count)
        runner.message_hub.update_scalar(f'train/{SCALAR}', count)
        print_log(
            f'Iteration {runner.iter} was skipped because of non-finite values in {causes} ({count} skipped so far).',
            logger='current',
            level=WARNING,
        )
        if self._consecutive > self.max_consecutive_skips:
            raise FloatingPointError(
                f'{self._consecutive} steps in a row had non-finite values, the last step in iteration {runner.iter}: '
                f'{causes}. The run cannot recover from this; resume from an earlier checkpoint with a lower '
                'learning rate.'
            )


def _all_finite(gradients: List[torch.Tensor]) -> torch.Tensor:
    """Return 1.0 if all gradients are finite, else 0.0. Check the norms first, which are fast but may overflow."""
    if not gradients:
        return torch.ones(())
    is_finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
    if not is_finite:
        is_finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    return is_finite.float()


def _locate(model: DiffKDDistiller, optimizer: Optimizer, names: dict) -> List[str]:
    """Return the names of the non-finite gradients on all ranks.

    The names are pairs and levels, or parameters if the gradients of all taps are finite.
    """
    sums = model.distill_state.tap_gradients.items()
    found = [f'diffkd.{pair}, level {level}' for (pair, level), total in sums if not total.isfinite()]
    if not found:
        parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        found = [names.get(p, 'a parameter outside the model') for p in parameters if not p.grad.isfinite().all()]
        # gradient clipping with a norm that is not finite makes all gradients non-finite
        if found and len(found) == len(parameters):
            found = ['all parameters']
        elif len(found) > 4:
            found = [*found[:4], f'{len(found) - 4} more parameters']
    return sorted({name for names_of_rank in all_gather_object(found) for name in names_of_rank})
