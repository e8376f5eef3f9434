"""Measure the cost of a training iteration with each method. The methods run in turn in one process."""

from typing import Dict

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from benchmarks.measure import in_turn, peak_mib, ratios
from mmdiffkd.utils.dummy_inputs import random_batch

SIZE = 160  # images have the crop size of both data sets


def measure(cfgs: Dict[str, Config], rounds: int) -> Dict[str, dict]:
    """Measure time and memory of a training step by method.

    Args:
        cfgs (dict[str, Config]): Configs by method, including ``'alone'``. Their teachers' checkpoints must exist.
        rounds (int): Number of steps per method.

    Returns:
        dict[str, dict]: Costs by method. ``time`` is the median ratio to the time of ``'alone'``. ``peak_mib`` is the
        peak memory of a step in MiB, without weights, optimizer state and images.
    """
    steps = {method: _step(cfg) for method, cfg in cfgs.items()}
    times = in_turn(steps, rounds)
    costs = {}
    for method, cfg in cfgs.items():
        ratio = ratios(times[method], times['alone'])['ratio']
        # the measured steps distill, but with an interval of n only every n-th iteration of a run does
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
