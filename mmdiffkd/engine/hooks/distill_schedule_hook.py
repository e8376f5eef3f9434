from typing import Optional

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.parallel import DistributedDataParallel

from mmdiffkd.registry import HOOKS

from ..checkpoint import PREFIX
from .utils import require_distiller, require_optimizer


@HOOKS.register_module()
class DistillScheduleHook(Hook):
    """Schedule of the distillation: start, end, warmup, decay and interval.

    Within ``[begin, end)``, the weight of every ``loss_kd`` rises linearly from 0 to 1 over ``warmup`` and falls to 0
    over the last ``decay``. The diffusion module trains at full weight, also during warmup and decay. Outside, neither
    the teacher nor the diffusion module runs, and the weights of the diffusion module do not change. The weight depends
    only on the iteration, so a resumed run continues the schedule. It is logged as ``diffkd.weight``.

    Under DDP, the idle diffusion module contributes zero gradients to the all-reduce, which costs communication in
    proportion to its parameters. Without a teacher, the hook does nothing.

    Args:
        begin (int): First epoch or iteration with distillation, counted from 0. Defaults to 0.
        end (int, optional): First epoch or iteration without distillation. None distills until the end of the training.
            Defaults to None.
        warmup (float): Length of the warmup. Defaults to 0.
        decay (float): Length of the decay before ``end``, or before the end of the training. Defaults to 0.
        interval (int): Distill only every ``interval`` iterations, counted from ``begin``. In between, neither the
            teacher nor the diffusion module runs, and the log repeats the last values. Defaults to 1.
        by_epoch (bool): Whether ``begin``, ``end``, ``warmup`` and ``decay`` are in epochs (epoch-based loops only) or
            in iterations. ``interval`` is always in iterations. Defaults to True.

    Raises:
        ValueError: If a number is negative, ``interval`` is below 1, or warmup and decay exceed ``[begin, end)``.
    """

    def __init__(
        self,
        begin: int = 0,
        end: Optional[int] = None,
        warmup: float = 0,
        decay: float = 0,
        interval: int = 1,
        by_epoch: bool = True,
    ):
        if interval < 1:
            raise ValueError(f'DistillScheduleHook(interval={interval}) must be 1 (every iteration) or more.')
        if min(begin, warmup, decay) < 0 or (end is not None and not begin + max(warmup + decay, 1) <= end):
            raise ValueError(
                f'DistillScheduleHook(begin={begin}, end={end}, warmup={warmup}, decay={decay}): no value may be '
                'negative, and warmup and decay must fit between begin and end.'
            )
        self.begin = begin
        self.end = end
        self.warmup = warmup
        self.decay = decay
        self.interval = interval
        self.by_epoch = by_epoch
        self._has_learnt = False  # since the last optimizer step
        self._handle = None

    def before_train(self, runner: Runner) -> None:
        """Convert epochs to iterations, and register a hook on the optimizer.

        Raises:
            TypeError: If the model is not a distiller, or the optimizer is not a single torch optimizer.
            ValueError: If epochs are given in an iteration-based loop, the schedule exceeds the training, or the
                diffusion module has no parameters.
        """
        model = require_distiller(runner, self)
        unit = 1
        if self.by_epoch:
            if not isinstance(runner.train_loop, EpochBasedTrainLoop):
                raise ValueError(
                    f'DistillScheduleHook counts epochs, but the {type(runner.train_loop).__name__} has none; set '
                    'by_epoch=False and give iterations.'
                )
            unit = len(runner.train_dataloader)
        self._begin, self._warmup, self._decay = self.begin * unit, self.warmup * unit, self.decay * unit
        self._end = runner.max_iters if self.end is None else self.end * unit
        if not self._begin + self._warmup + self._decay <= self._end <= runner.max_iters:
            raise ValueError(
                f'DistillScheduleHook: begin={self.begin}, end={self.end}, warmup={self.warmup} and decay={self.decay} '
                f'do not fit into the {runner.max_iters // unit} {"epochs" if self.by_epoch else "iterations"} of this '
                'training.'
            )
        if model.diffkd_teacher is None:
            return
        model.distill_state.attach_unused_params = isinstance(runner.model, DistributedDataParallel)
        part = list(model.diffkd.parameters())
        if not part:
            raise ValueError(
                'DistillScheduleHook found no parameters in the diffusion module; with FSDP, set use_orig_params=True.'
            )
        optimizer = require_optimizer(runner, self)
        self.after_train(runner)  # removes the hook of an earlier run
        self._handle = optimizer.register_step_pre_hook(lambda *args: self._clear_unused_gradients(part))

    def after_train(self, runner: Runner) -> None:
        """Remove the hook from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def weight(self, iteration: int) -> Optional[float]:
        """Return the weight of ``loss_kd`` in an iteration, counted from 0; None without distillation."""
        if not self._begin <= iteration < self._end or (iteration - self._begin) % self.interval:
            return None
        rise = (iteration + 1 - self._begin) / self._warmup if self._warmup else 1.0
        fall = (self._end - iteration) / self._decay if self._decay else 1.0
        return min(1.0, rise, fall)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Set the distillation weight of this iteration."""
        model = require_distiller(runner, self)
        if model.diffkd_teacher is None:
            return
        weight = self.weight(runner.iter)
        state = model.distill_state
        state.enabled, state.weight = weight is not None, 1.0 if weight is None else weight
        self._has_learnt |= state.enabled
        if not self._begin <= runner.iter < self._end:  # else the log would repeat the last values
            scalars, pairs = runner.message_hub.log_scalars, tuple(f'train/{PREFIX}{pair}.' for pair in model.pairs)
            for key in [key for key in scalars if key.startswith(pairs)]:
                del scalars[key]
        runner.message_hub.update_scalar('train/diffkd.weight', weight or 0.0)

    def _clear_unused_gradients(self, part: list) -> None:
        """Clear gradients of an idle diffusion module, so that momentum and weight decay do not change its weights."""
        if not self._has_learnt:
            for parameter in part:
                parameter.grad = None
        self._has_learnt = False
