"""``loss_weight='auto'``: choose the weight of a pair by the gradients at its taps.

While a pair is measured, tensor hooks record two gradients in the backward pass of each iteration: that of the
student's own losses, and that of the distillation. There is no additional backward pass.
"""

import inspect
from math import exp, isfinite, log
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.validation import ConfigError, get_class, in_key

from .autograd_graph import walk_graph

AUTO = 'auto'
KEY = 'loss_weight'
# Gradient of the distillation divided by the gradient of the student's own losses, at the student's taps: for features,
# and for taps in heads, whose outputs the student's losses train directly. A distance or neck with a different
# attribute ``gradient_ratio`` overrides both.
FEATURE_RATIO = 1.5
HEAD_RATIO = 0.3
NUM_MEASUREMENTS = 100  # iterations whose mean is the final weight
MAX_FAILURES = 20  # iterations without a gradient, from the start, after which the run stops


def without_auto(cfg: dict) -> Tuple[dict, bool]:
    """Replace each ``loss_weight='auto'`` of a neck by 1, or leave it out if the class has no such argument.

    Args:
        cfg (dict): Config of the neck.

    Returns:
        tuple[dict, bool]: The config, and whether there was such a weight.

    Raises:
        ValueError: If a ``loss_weight`` is another string.
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
    """Weight of a pair with ``loss_weight='auto'``. It is a part of the pair's neck, so that checkpoints contain it.

    The weight is ``ratio`` times the geometric mean, over ``NUM_MEASUREMENTS`` iterations, of norm(g_s) / norm(g_d).
    g_s is the gradient of the student's own losses at the student's taps, and g_d is that of the pair's losses with
    weight 1. The norms are over all levels, images and ranks. If levels are computed from each other, as in a backbone,
    only the last one is measured. Losses of other pairs that reach the taps count as the student's own. Both gradients
    have the same loss scale, so the weight does not depend on mixed precision.

    Measurements in the warmup of the learning rate or of ``DistillScheduleHook`` do not count: there, the latest one
    applies. Then, until the last measurement, the mean of the previous ones applies. The first weight makes the pair's
    losses as large as the student's own.

    Args:
        ratio (float): Ratio of the gradients of the distillation and of the student's own losses.

    Attributes:
        log_ratio (Tensor): Mean of log(norm(g_s) / norm(g_d)), a scalar.
        count (Tensor): Number of measurements in the mean, a scalar. 0 if ``log_ratio`` is a measurement that does not
            count, and -1 before the first measurement.
    """

    def __init__(self, ratio: float = FEATURE_RATIO):
        super().__init__()
        self.ratio = ratio
        self.register_buffer('log_ratio', torch.zeros(()))
        self.register_buffer('count', torch.full((), -1))
        self._cache: Optional[tuple] = None  # versions and values of the buffers, to read them from a GPU only once
        self._norms: Optional[Tensor] = None  # this rank's squared norms of g_s and g_d, (2, )
        self._counts: Optional[bool] = None  # whether the measurement of this iteration counts; None without one
        self.failures = 0

    @property
    def measured(self) -> float:
        """The weight according to the measurements."""
        return self.ratio * exp(self._read()[0])

    @property
    def is_fixed(self) -> bool:
        """Whether the weight is final."""
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
        """Prepare the measurement of an iteration, which does not count in a warmup.

        The first measurement does not count, either: if the first weight is far too large, the sum of both gradients
        does not contain that of the student's losses with enough digits.
        """
        self._norms, self._counts = None, self._read()[1] >= 0 and not in_warmup

    def add(self, own: Tensor, distillation: Tensor) -> None:
        """Add the squared gradient norms of a level: of the student's own losses, and of the pair with weight 1."""
        norms = torch.stack([own, distillation])
        self._norms = norms if self._norms is None else self._norms + norms

    def update(self, norms: Optional[Sequence[float]] = None) -> None:
        """Add the measurement of the last iteration to the mean.

        Args:
            norms (list[float], optional): Sums over all ranks of both squared norms; None for those of this rank.
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
        else:  # neither in the warmup nor counted: the schedule decays
            return
        self.log_ratio.fill_(log_ratio)
        self.count.fill_(count)

    def _read(self) -> Tuple[float, int]:
        versions = self.log_ratio._version, self.count._version  # hooks can change buffers
        if self._cache is None or self._cache[0] != versions:
            self._cache = versions, (self.log_ratio.item(), self.count.item())
        return self._cache[1]

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._cache = None  # the buffers are other tensors, perhaps of another type
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
    """Update weights, by pair, by the gradients of the last iteration on all ranks, which all call this function.

    Raises:
        ValueError: If no gradient has reached a tap from the start.
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
            print_log(f"distill.{name}: loss_weight='auto' is fixed at {weight.measured:.4g}.", logger='current')
        if weight.failures >= MAX_FAILURES:
            raise ValueError(
                f"distill.{name}: loss_weight='auto' needs gradients of the student's own losses and of the "
                f"distillation at the student's tap, and found none in {weight.failures} iterations; set a number."
            )


def find_ratio(neck: nn.Module, taps: Sequence[str]) -> float:
    """Return the gradient ratio of a neck: that of its distance, or else of its own class, or else of its taps."""
    distance = next((module for name, module in neck.named_modules() if name.endswith('loss_kd')), neck)
    default = HEAD_RATIO if any('head' in tap.split('.')[0] for tap in taps) else FEATURE_RATIO
    return getattr(distance, 'gradient_ratio', getattr(neck, 'gradient_ratio', default))


def learning_rate_rises() -> bool:
    """Return whether the learning rate of the current iteration is higher than that of the previous one."""
    history = MessageHub.get_current_instance().log_scalars.get('train/lr')
    rates = history.data[0][-2:] if history is not None else ()
    return len(rates) == 2 and bool(rates[1] > rates[0])


class TapGradients:
    """Gradients at the outputs of tapped modules in one iteration.

    Args:
        weights (dict[str, AutoWeight]): Weights by pair. Those that are not fixed are measured.
        schedule_weight (float): Factor of the distillation losses; less than 1 in a warmup.

    Attributes:
        weights (dict[str, AutoWeight]): The measured weights.
        scales (dict[str, float or Tensor]): Factor of the losses of each pair.
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
        """Measure the gradients at an output of a tapped module in the backward pass, by a tensor hook.

        Args:
            output (Tensor): The output, which the student continues with.
            copy (Tensor): Copy of the output for the necks.
        """
        if not copy.requires_grad:
            return
        branches = self._branches[id(copy)] = []

        def measure(gradient: Tensor) -> None:
            for pair, received in branches:
                if received:  # the gradient of the distillation, which is a part of the gradient of the output
                    distillation = received.pop()
                    scale = self.scales[pair]
                    own = _squared_norm(gradient - distillation)
                    self.weights[pair].add(own, (_squared_norm(distillation).sqrt() / scale).square())

        output.register_hook(measure)

    def branch(self, pair: str, copy: Optional[Tensor]) -> Optional[Tensor]:
        """Return a view of a copy for the neck of a pair, to which only this pair sends gradients."""
        if copy is None or id(copy) not in self._branches:
            return copy
        view, received = copy.view_as(copy), []
        view.register_hook(received.append)
        branches = self._branches[id(copy)]
        branches.append((pair, received))
        self._edges[pair][copy.grad_fn.next_functions[0]] = branches, branches[-1]
        return view

    def leave_out_early_levels(self, pair: str) -> None:
        """Do not measure levels that later levels of the pair are computed from, such as stages of a backbone.

        There, the gradient that the student passes on contains the distillation of the later levels, so that a larger
        weight would be measured as a larger gradient of the student's own losses.
        """
        edges = self._edges.pop(pair)  # frees the nodes of the graph: the hooks keep this object
        early = {edge for node, _ in edges for edge in walk_graph(list(node.next_functions)) if edge in edges}
        for edge in early:
            branches, branch = edges[edge]
            branches.remove(branch)


def _squared_norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
