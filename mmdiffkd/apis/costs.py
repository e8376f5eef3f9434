"""Measure time and memory of training iterations.

To free the GPU memory after the measurement, run this module in a separate process:
``python -m mmdiffkd.apis.costs OUT.json CONFIG ...``
"""

import gc
import json
import statistics
import sys
import time
from itertools import accumulate, cycle
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Union

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.profiler import ProfilerActivity, profile

from mmdiffkd.utils.config import set_loader_defaults, type_name

from .build import build_model

MIB = 2**20
SECONDS, MOST_ROUNDS = 10.0, 5  # per config: time for the measurement, and maximum number of timed iterations
BATCHES = 2  # number of training batches, which are used in turn


def measure_costs(cfgs: Dict[str, Config]) -> Dict[str, dict]:
    """Measure training iterations on images of the training set.

    Args:
        cfgs (dict[str, Config]): Configs with the same data, by name. The first one is the baseline.

    Returns:
        dict[str, dict]: Costs by name, with the keys of :func:`measure_iterations`. ``seconds`` includes the time to
        load the images if there are no worker processes. ``iterations`` is the number of iterations of the training.

    Raises:
        Exception: If the training data cannot be loaded, or an iteration of the baseline fails.
    """
    cfg = next(iter(cfgs.values()))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    batches, length, loading = _load_batches(cfg)
    costs = measure_iterations(cfgs, batches)
    for name, cost in costs.items():
        if 'error' not in cost:
            cost.update(seconds=cost['seconds'] + loading, iterations=_iterations(cfgs[name], length))
    return costs


def measure_iterations(
    cfgs: Dict[str, Config], batches: Sequence, rounds: Optional[int] = None
) -> Dict[str, Dict[str, Union[float, str]]]:
    """Measure training iterations on given batches.

    Iterations of the baseline and of another config run in turn, so that a change in the load of the machine affects
    both. At most two models are in memory.

    Args:
        cfgs (dict[str, Config]): Configs with the same data, by name. The first one is the baseline.
        batches (list): Batches of the dataloader, which are used in turn.
        rounds (int, optional): Number of timed iterations per config. Defaults to None: as many as fit into
            ``SECONDS``, and at most ``MOST_ROUNDS``.

    Returns:
        dict[str, dict]: Costs by name:

        * ``seconds``: median time of an iteration.
        * ``time``: time of an iteration divided by that of the baseline, as a median.
        * ``peak_mib``: peak memory of an iteration in MiB, without weights, optimizer state and images.

        If an iteration fails, the only key is ``error``.

    Raises:
        Exception: If an iteration of the baseline fails.
    """
    baseline, *names = cfgs
    base, costs = training_step(cfgs[baseline], batches), {}
    steps = {}
    for name in [baseline, *names]:
        steps.clear()
        gc.collect()  # free the previous model: its hooks refer to it, which is a reference cycle
        try:
            steps = {baseline: base, name: base if name == baseline else training_step(cfgs[name], batches)}
            seconds = sum(_seconds(step) for step in steps.values() for _ in range(2)) / 2
            count = rounds or max(1, min(MOST_ROUNDS, int(SECONDS / seconds)))
            times = in_turn(steps, rounds=count, warmup=0)
            ratio = statistics.median(a / b for a, b in zip(times[name], times[baseline]))
            peak = peak_mib(steps[name])
        except Exception as error:  # for example, the teacher's weights do not fit, or the memory is too small
            if name == baseline:
                raise
            costs[name] = dict(error=f'{type(error).__name__}: {error}')
            continue
        # all measured iterations distill; with interval=n in DistillScheduleHook, a run distills every n-th iteration
        ratio = 1 + (ratio - 1) / _interval(cfgs[name])
        alone = costs[baseline]['seconds'] if costs else statistics.median(times[name])
        costs[name] = dict(seconds=alone * ratio, time=ratio, peak_mib=peak)
    return costs


def _load_batches(cfg: Config):
    """Return batches, the number of batches per epoch, and the seconds per batch that a training waits for loading."""
    cfg = Config(cfg.to_dict())
    set_loader_defaults(cfg)
    settings = cfg.train_dataloader
    has_workers = settings.get('num_workers', 0) > 0
    settings.update(num_workers=0, persistent_workers=False)
    settings.pop('prefetch_factor', None)
    loader = Runner.build_dataloader(settings, seed=0)
    start = time.perf_counter()
    batches = [batch for batch, _ in zip(loader, range(BATCHES))]
    loading = (time.perf_counter() - start) / max(len(batches), 1)
    return batches, len(loader), 0.0 if has_workers else loading


def _iterations(cfg: Config, epoch_length: int) -> int:
    return cfg.train_cfg.max_iters if 'max_iters' in cfg.train_cfg else cfg.train_cfg.max_epochs * epoch_length


def training_step(cfg: Config, batches: Sequence) -> Callable:
    """Build a model, and return a function that trains it for one iteration; the batches are used in turn."""
    MessageHub.get_current_instance().runtime_info.update(iter=0, epoch=0)  # some models read iter and epoch
    model = build_model(cfg, cfg.model).to(get_device())
    model.init_weights()
    model.train()
    optim_wrapper, turn = build_optim_wrapper(model, cfg.optim_wrapper), cycle(batches)
    return lambda: model.train_step(next(turn), optim_wrapper)


def _interval(cfg: Config) -> int:
    hooks = [hook for hook in cfg.get('custom_hooks') or () if type_name(hook['type']) == 'DistillScheduleHook']
    return hooks[0].get('interval', 1) if hooks else 1


def in_turn(functions: Dict[str, Callable], rounds: int, warmup: int = 2) -> Dict[str, List[float]]:
    """Time functions in turn, so that a change in the load of the machine affects all of them.

    Args:
        functions (dict[str, callable]): Functions without arguments, by name.
        rounds (int): Number of timed calls per function.
        warmup (int): Number of calls per function before the timing starts. Defaults to 2.

    Returns:
        dict[str, list[float]]: Seconds per call, by name.
    """
    times: Dict[str, List[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name, function in functions.items():
            seconds = _seconds(function)
            if index >= warmup:
                times[name].append(seconds)
    return times


def _seconds(function: Callable) -> float:
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(step: Callable) -> float:
    """Return the peak memory of a step in MiB, minus the memory that is in use before the step."""
    gc.collect()
    if torch.cuda.is_available():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / MIB


def main() -> None:
    """Measure the configs named in the command line, and write a JSON file with the costs by config name."""
    out, *files = sys.argv[1:]
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the runs of a comparison use one thread as well
    costs = measure_costs({Path(file).stem: Config.fromfile(file) for file in files})
    Path(out).write_text(json.dumps(costs), 'utf-8')


if __name__ == '__main__':
    main()
