"""``loss_weight='auto'``: choose the loss weight of a pair from the gradients at the student's taps.

In the first iterations, tensor hooks measure two gradients in the backward pass: the gradient of the student's own
losses and the gradient of the distillation losses. No additional backward pass is needed.
"""

import inspect
from math import exp, isfinite, log
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, get_class, in_key

from .autograd_graph import walk_graph

AUTO = 'auto'
KEY = 'loss_weight'
# Target for the norm of the distillation gradient divided by the norm of the gradient of the student's own losses, at
# the student's taps. Taps in heads have a smaller target, because the student's own losses train their outputs
# directly. A distance or neck can set its own target in the attribute ``gradient_ratio``.
FEATURE_RATIO = 1.5
HEAD_RATIO = 0.3
NUM_MEASUREMENTS = 100  # the weight is final after this number of measured iterations
MAX_FAILURES = 20  # the run stops if the first 20 measured iterations have no gradient


def without_auto(cfg: dict) -> Tuple[dict, bool]:
    """Replace each ``loss_weight='auto'`` in the config of a neck by 1.

    If the class of the neck or loss has no argument ``loss_weight``, the key is removed instead.

    Args:
        cfg (dict): Config of the neck.

    Returns:
        tuple[dict, bool]: The changed config, and whether the config contained ``loss_weight='auto'``.

    Raises:
        ValueError: If a ``loss_weight`` is a string other than ``'auto'``.
    """
    kept, is_auto = {}, False
    for key, value in cfg.items():
        with in_key(key):
            if key == KEY and isinstance(value, str):
                if value != AUTO:
                    raise ConfigError('', f"={value!r} must be a number of at least 0, or '{AUTO}'.")
                is_auto = True
                if not _takes_weight(cfg.get('type')):
                    continue
                value = 1.0
            elif isinstance(value, dict):
                value, found = without_auto(value)
                is_auto |= found
            elif isinstance(value, (list, tuple)):
                entries = [without_auto(entry) if isinstance(entry, dict) else (entry, False) for entry in value]
                value = type(value)(entry for entry, _ in entries)
                is_auto |= any(found for _, found in entries)
        kept[key] = value
    return (kept if is_auto else cfg), is_auto


def _takes_weight(kind) -> bool:
    cls = get_class(MODELS, kind) if isinstance(kind, str) else kind
    return callable(cls) and KEY in inspect.signature(cls).parameters


class AutoWeight(nn.Module):
    """Loss weight of a pair with ``loss_weight='auto'``. A submodule of the pair's neck, so checkpoints contain it.

    The weight is ``ratio`` times the geometric mean, over ``NUM_MEASUREMENTS`` iterations, of norm(g_s) / norm(g_d).
    g_s is the gradient of the student's own losses at the student's taps, and g_d is the gradient of the pair's losses
    with weight 1. The norms are over all levels, images and ranks. If later levels are computed from earlier levels, as
    in a backbone, only the last level is measured. Losses of other pairs that reach the taps count as the student's
    own. Both gradients have the same loss scale, so the weight does not depend on mixed precision.

    The weight changes in four phases:

    * Before the first measurement, the weight makes the pair's losses as large as the student's own losses.
    * During the warmup of the learning rate or of ``DistillScheduleHook``, the weight follows the latest measurement.
      These measurements and the first one are not part of the mean.
    * After the warmup, the weight follows the mean of the measurements since the warmup.
    * After ``NUM_MEASUREMENTS`` measurements in the mean, the weight is final.

    Args:
        ratio (float): Target for norm(distillation gradient) / norm(gradient of the student's own losses).

    Attributes:
        log_ratio (Tensor): Mean of log(norm(g_s) / norm(g_d)), a scalar.
        count (Tensor): Number of measurements in the mean, a scalar. It is -1 before the first measurement, and 0 while
            ``log_ratio`` is a single measurement that is not part of the mean.
    """

    def __init__(self, ratio: float = FEATURE_RATIO):
        super().__init__()
        self.ratio = ratio
        self.register_buffer('log_ratio', torch.zeros(()))
        self.register_buffer('count', torch.full((), -1))
        self._cache: Optional[tuple] = None  # versions and values of the buffers, to copy them from the GPU only once
        self._norms: Optional[Tensor] = None  # this rank's squared norms of g_s and g_d, (2, )
        # whether the mean includes the measurement of this iteration; None if nothing is measured in this iteration
        self._counts: Optional[bool] = None
        self.failures = 0

    @property
    def measured(self) -> float:
        """The weight that follows from the measurements so far."""
        return self.ratio * exp(self._read()[0])

    @property
    def is_fixed(self) -> bool:
        """Whether the weight is final, so that no more measurements are needed."""
        return self._read()[1] >= NUM_MEASUREMENTS

    def value(self, own_loss: Tensor, pair_loss: Tensor) -> Union[float, Tensor]:
        """Return the weight of this iteration.

        Args:
            own_loss (Tensor): Sum of the student's own losses, a scalar.
            pair_loss (Tensor): Sum of the pair's losses with weight 1, a scalar.
        """
        if self._read()[1] >= 0:
            return self.measured
        balanced = own_loss.detach().abs() / pair_loss.detach().abs()
        return torch.where(balanced.isfinite(), balanced, torch.ones_like(balanced))

    def expect(self, in_warmup: bool) -> None:
        """Prepare the measurement of an iteration. The mean leaves out iterations in a warmup and the first one.

        The first measurement may be inexact: the gradient of the student's losses is computed as a difference, which
        loses its digits if the first weight is far too large.

        Args:
            in_warmup (bool): Whether the iteration is in the warmup of the learning rate or of the distillation.
        """
        self._norms, self._counts = None, self._read()[1] >= 0 and not in_warmup

    def add(self, own: Tensor, distillation: Tensor) -> None:
        """Add the squared gradient norms of one level to the measurement of this iteration.

        Args:
            own (Tensor): Squared norm of the gradient of the student's own losses, a scalar.
            distillation (Tensor): Squared norm of the gradient of the pair's losses with weight 1, a scalar.
        """
        norms = torch.stack([own, distillation])
        self._norms = norms if self._norms is None else self._norms + norms

    def update(self, norms: Optional[Sequence[float]] = None) -> None:
        """Update the mean with the measurement of the last iteration.

        Args:
            norms (list[float], optional): Squared norms of g_s and g_d, each summed over all ranks. None uses the norms
                of this rank. Defaults to None.
        """
        if norms is None:
            norms = [0.0, 0.0] if self._norms is None else self._norms.tolist()
        counts, self._norms, self._counts = self._counts, None, None
        if counts is None:
            return
        own, distillation = norms
        log_ratio, count = self._read()
        if not (isfinite(own) and isfinite(distillation) and own > 0 and distillation > 0):
            self.failures += count < 0
            return
        measured = (log(own) - log(distillation)) / 2
        if counts:
            count += 1
            log_ratio += (measured - log_ratio) / count
        elif count < 1:
            log_ratio, count = measured, 0
        else:  # the schedule lowers the distillation weight again after the warmup: ignore the measurement
            return
        self.log_ratio.fill_(log_ratio)
        self.count.fill_(count)

    def _read(self) -> Tuple[float, int]:
        versions = self.log_ratio._version, self.count._version  # hooks may have changed the buffers
        if self._cache is None or self._cache[0] != versions:
            self._cache = versions, (self.log_ratio.item(), self.count.item())
        return self._cache[1]

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._cache = None  # super()._apply() replaces the buffers by new tensors, perhaps of a different dtype
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._cache = self._norms = self._counts = None

    def _save_to_state_dict(self, *args) -> None:
        if self._norms is not None and get_world_size() == 1:
            self.update()
        super()._save_to_state_dict(*args)

    def __getstate__(self):
        return {**vars(self), '_cache': None, '_norms': None, '_counts': None}


def update_together(weights: Dict[str, AutoWeight]) -> None:
    """Update the weights from the gradients of the last iteration on all ranks. All ranks must call this function.

    Args:
        weights (dict[str, AutoWeight]): Weights by pair. Final weights are skipped.

    Raises:
        ValueError: If no gradient has reached the taps of a pair since the start.
    """
    weights = {name: weight for name, weight in weights.items() if not weight.is_fixed}
    if not weights:
        return
    device = next(iter(weights.values())).log_ratio.device
    zeros = torch.zeros(2, device=device)
    norms = torch.stack([zeros if weight._norms is None else weight._norms.to(device) for weight in weights.values()])
    all_reduce(norms)
    for (name, weight), of_pair in zip(weights.items(), norms.tolist()):
        weight.update(of_pair)
        if weight.is_fixed:
            print_log(f"distill.{name}: loss_weight='auto' is now fixed at {weight.measured:.4g}.", logger='current')
        if weight.failures >= MAX_FAILURES:
            raise ValueError(
                f"distill.{name}: loss_weight='auto' needs two gradients at the student's tap, that of the student's "
                'own losses and that of the distillation, but at least one of them was missing or not finite in '
                f'{weight.failures} iterations. Set loss_weight to a number.'
            )


def find_ratio(neck: nn.Module, taps: Sequence[str]) -> float:
    """Return the target ratio of the gradients for a neck.

    The first of these that exists is used: ``gradient_ratio`` of the neck's distance, ``gradient_ratio`` of the neck,
    the default for its taps.
    """
    distance = next((module for name, module in neck.named_modules() if name.endswith('loss_kd')), neck)
    in_head = any(part.endswith('head') for tap in taps for part in tap.split('.'))  # also in wrapped detectors
    default = HEAD_RATIO if in_head else FEATURE_RATIO
    return getattr(distance, 'gradient_ratio', getattr(neck, 'gradient_ratio', default))


def learning_rate_rises() -> bool:
    """Return whether the learning rate has risen since the previous iteration, as in a warmup."""
    history = MessageHub.get_current_instance().log_scalars.get('train/lr')
    rates = history.data[0][-2:] if history is not None else ()
    return len(rates) == 2 and bool(rates[1] > rates[0])


class TapGradients:
    """Measure the gradients at the outputs of tapped modules in one iteration.

    Args:
        weights (dict[str, AutoWeight]): Weights by pair. Only weights that are not final are measured.
        schedule_weight (float): Factor of the distillation losses from ``DistillScheduleHook``; less than 1 in a
            warmup.

    Attributes:
        weights (dict[str, AutoWeight]): The weights that are measured in this iteration, by pair.
        scales (dict[str, float or Tensor]): Factor of the losses of each pair, set by the distiller.
    """

    def __init__(self, weights: Dict[str, AutoWeight], schedule_weight: float):
        is_measured = torch.is_grad_enabled() and schedule_weight > 0
        self.weights = {name: weight for name, weight in weights.items() if is_measured and not weight.is_fixed}
        self.scales: Dict[str, Union[float, Tensor]] = {}
        self._branches: Dict[int, List[tuple]] = {}
        self._edges: Dict[str, Dict[tuple, tuple]] = {name: {} for name in self.weights}
        in_warmup = schedule_weight < 1 or learning_rate_rises()
        for weight in self.weights.values():
            weight.expect(in_warmup)

    def watch(self, output: Tensor, copy: Tensor) -> None:
        """Register a tensor hook that measures the gradients at an output of a tapped module.

        Args:
            output (Tensor): The output, which the student's next layers use.
            copy (Tensor): Copy of the output, which the necks use.
        """
        if not copy.requires_grad:
            return
        branches = self._branches[id(copy)] = []

        def measure(gradient: Tensor) -> None:
            for pair, received in branches:
                if received:  # gradient of the pair's losses; ``gradient`` is the sum of this and all other gradients
                    distillation = received.pop()
                    scale = self.scales[pair]
                    own = _squared_norm(gradient - distillation)
                    self.weights[pair].add(own, (_squared_norm(distillation).sqrt() / scale).square())

        output.register_hook(measure)

    def branch(self, pair: str, copy: Optional[Tensor]) -> Optional[Tensor]:
        """Return a view of the copied output for the neck of one pair. Only this pair's losses send gradients to it."""
        if copy is None or id(copy) not in self._branches:
            return copy
        view, received = copy.view_as(copy), []
        view.register_hook(received.append)
        branches = self._branches[id(copy)]
        branches.append((pair, received))
        self._edges[pair][copy.grad_fn.next_functions[0]] = branches, branches[-1]
        return view

    def leave_out_early_levels(self, pair: str) -> None:
        """Stop measuring levels from which later levels of the pair are computed, such as early stages of a backbone.

        At an early level, the gradient from the student's next layers includes the distillation gradient of the later
        levels. A larger weight would therefore look like a larger gradient of the student's own losses.
        """
        edges = self._edges.pop(pair)  # remove the edges: the hooks keep this object, and the edges keep the graph
        early = {edge for node, _ in edges for edge in walk_graph(list(node.next_functions)) if edge in edges}
        for edge in early:
            branches, branch = edges[edge]
            branches.remove(branch)


def _squared_norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
