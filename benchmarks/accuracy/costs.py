"""What an iteration of every method costs: whole training steps on one random batch, in turn in one process."""

from typing import Dict

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from benchmarks.measure import in_turn, peak_mib, ratios
from mmdiffkd.utils.dummy_inputs import random_batch

SIZE = 160  # of the crops that both sets train on


def measure(cfgs: Dict[str, Config], rounds: int) -> Dict[str, dict]:
    """Time and memory of a training step.

    Args:
        cfgs (dict[str, Config]): Config of every method; the teachers are there. ``'alone'`` is what times refer to.
        rounds (int): Steps of every method.

    Returns:
        dict[str, dict]: For every method ``time``, the median ratio to the student alone, and ``peak_mib``, the most
        memory that a step takes beyond weights, optimizer and images.
    """
    steps = {method: _step(cfg) for method, cfg in cfgs.items()}
    times = in_turn(steps, rounds)
    costs = {}
    for method, cfg in cfgs.items():
        ratio = ratios(times[method], times['alone'])['ratio']
        # of those that distil now and then, most iterations are the student's own
        costs[method] = dict(time=1 + (ratio - 1) / _interval(cfg), peak_mib=peak_mib(steps[method]))
    return costs


def _step(cfg: Config):
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = random_batch(cfg, SIZE, cfg.train_dataloader.batch_size)
    return lambda: model.train_step(batch, optim_wrapper)


def _interval(cfg: Config) -> int:
    hooks = [hook for hook in cfg.get('custom_hooks', ()) if hook['type'] == 'mmdiffkd.DistillScheduleHook']
    return hooks[0].get('interval', 1) if hooks else 1
