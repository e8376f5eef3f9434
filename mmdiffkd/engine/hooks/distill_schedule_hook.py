from math import cos, pi
from typing import Annotated, Literal, Optional

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.check_config import ConfigError, Limits, Natural, NonNegative, check_arguments

from ..checkpoint import PREFIX
from .utils import require_distiller, require_optimizer


@HOOKS.register_module()
class DistillScheduleHook(Hook):
    """Schedule of the distillation: start, end, warmup, decay and interval.

    Distillation starts at ``begin`` and is off from ``end`` on. The factor of every ``loss_kd`` rises linearly from 0
    to 1 during the warmup, and falls to 0 during the decay. The losses of the diffusion module always have their full
    weight. Before ``begin`` and from ``end`` on, neither the teacher nor the diffusion module runs, and the weights of
    the diffusion module do not change. The factor depends only on the iteration, so a resumed run continues the
    schedule. The factor is logged as ``diffkd.weight``.

    While distillation is off, DDP still communicates gradients of the diffusion module, which are all zero. Without a
    teacher, the hook does nothing.

    Args:
        begin (int): First epoch or iteration with distillation, counted from 0. Defaults to 0.
        end (int, optional): First epoch or iteration without distillation. None distills until the end of the training.
            Defaults to None.
        warmup (float): Length of the warmup. Defaults to 0.
        decay (float): Length of the decay before ``end``, or before the end of the training. Defaults to 0.
        decay_curve (str): ``'linear'``, or ``'cosine'``, which falls slowly at the start and at the end: the factor is
            (1 + cos(pi * x)) / 2 after a fraction x of the decay. Defaults to ``'linear'``.
        interval (int): Distill only every ``interval`` iterations, counted from ``begin``. In between, neither the
            teacher nor the diffusion module runs, and the log repeats the last values. Defaults to 1.
        by_epoch (bool): Whether ``begin``, ``end``, ``warmup`` and ``decay`` are in epochs (epoch-based loops only) or
            in iterations. ``interval`` is always in iterations. Defaults to True.

    Raises:
        ValueError: If a number is negative, ``interval`` is below 1, or warmup and decay are longer than the time from
            ``begin`` to ``end``.
    """

    @check_arguments
    def __init__(
        self,
        begin: Natural = 0,
        end: Optional[Natural] = None,
        warmup: NonNegative = 0,
        decay: NonNegative = 0,
        decay_curve: Literal['linear', 'cosine'] = 'linear',
        interval: Annotated[int, Limits(1)] = 1,
        by_epoch: bool = True,
    ):
        if end is not None and not begin + max(warmup + decay, 1) <= end:
            raise ConfigError(
                'end',
                f'={end} is too early: it must be above begin, and at least begin + warmup + decay = '
                f'{begin} + {warmup} + {decay}.',
            )
        self.begin = begin
        self.end = end
        self.warmup = warmup
        self.decay = decay
        self.decay_curve = decay_curve
        self.interval = interval
        self.by_epoch = by_epoch
        self._has_distilled = False  # whether an iteration since the last optimizer step had distillation
        self._handle = None

    def before_train(self, runner: Runner) -> None:
        """Convert epochs to iterations, and protect the weights of the diffusion module while distillation is off.

        Raises:
            ValueError: If the model is not a distiller, or the optimizer is not a single torch optimizer.
            ValueError: If epochs are given in an iteration-based loop, the schedule is longer than the training, some
                iterations would train nothing because ``task_loss`` is False, or FSDP has replaced the parameters of
                the diffusion module.
        """
        model = require_distiller(runner, self)
        unit = 1
        if self.by_epoch:
            if not isinstance(runner.train_loop, EpochBasedTrainLoop):
                raise ValueError(
                    f'DistillScheduleHook counts epochs, but the {type(runner.train_loop).__name__} has no epochs; set '
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
        if not model.task_loss and (self._begin > 0 or self._end < runner.max_iters or self.interval > 1):
            raise ValueError(
                'DistillScheduleHook turns the distillation off in some iterations, in which nothing would be trained '
                'because task_loss=False: remove begin, end and interval.'
            )
        if model.diffkd_teacher is None:
            return
        model.distill_state.attach_unused_params = isinstance(runner.model, DistributedDataParallel)
        parameters = list(model.diffkd.parameters())
        # some methods, such as KD, train nothing but the student
        if not parameters and any(isinstance(module, FullyShardedDataParallel) for module in runner.model.modules()):
            raise ValueError(
                'DistillScheduleHook found no parameters in the diffusion module; with FSDP, set use_orig_params=True.'
            )
        optimizer = require_optimizer(runner, self)
        self.after_train(runner)  # remove the optimizer hook of an earlier run
        self._handle = optimizer.register_step_pre_hook(lambda *args: self._clear_unused_gradients(parameters))

    def after_train(self, runner: Runner) -> None:
        """Remove the hook from the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def weight(self, iteration: int) -> Optional[float]:
        """Return the factor of ``loss_kd`` in an iteration, counted from 0; None if distillation is off in it."""
        if not self._begin <= iteration < self._end or (iteration - self._begin) % self.interval:
            return None
        rise = (iteration + 1 - self._begin) / self._warmup if self._warmup else 1.0
        fall = min(1.0, (self._end - iteration) / self._decay) if self._decay else 1.0
        if self.decay_curve == 'cosine':
            fall = (1 - cos(pi * fall)) / 2
        return min(1.0, rise, fall)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Set the factor of ``loss_kd`` for this iteration."""
        model = require_distiller(runner, self)
        if model.diffkd_teacher is None:
            return
        weight = self.weight(runner.iter)
        state = model.distill_state
        state.enabled, state.weight = weight is not None, 1.0 if weight is None else weight
        self._has_distilled |= state.enabled
        if not self._begin <= runner.iter < self._end:  # delete the last values, which the log would repeat
            scalars, pairs = runner.message_hub.log_scalars, tuple(f'train/{PREFIX}{pair}.' for pair in model.pairs)
            for key in [key for key in scalars if key.startswith(pairs)]:
                del scalars[key]
        runner.message_hub.update_scalar('train/diffkd.weight', weight or 0.0)

    def _clear_unused_gradients(self, parameters: list) -> None:
        """Clear the gradients of the diffusion module if it did not run, so that the optimizer leaves it unchanged.

        Zero gradients would not suffice, because momentum and weight decay would still change the weights.
        """
        if not self._has_distilled:
            for parameter in parameters:
                parameter.grad = None
        self._has_distilled = False
