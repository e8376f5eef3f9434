"""What the benchmarks share: timing in turn, memory, tables."""

import gc
import json
import platform
import statistics
import time
from itertools import accumulate
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import torch
from mmengine.utils import get_git_hash
from mmengine.utils.dl_utils import collect_env
from torch.profiler import ProfilerActivity, profile

import mmdiffkd

MIB = 2**20


def in_turn(ways: Dict[str, Callable], rounds: int, warmup: int = 2) -> Dict[str, List[float]]:
    """Seconds of every way, which run in turn, so that all see the same mood of the machine."""
    times: Dict[str, List[float]] = {name: [] for name in ways}
    for index in range(warmup + rounds):
        for name, way in ways.items():
            seconds = _seconds(way)
            if index >= warmup:
                times[name].append(seconds)
    return times


def _seconds(way: Callable) -> float:
    _wait()
    start = time.perf_counter()
    way()
    _wait()
    return time.perf_counter() - start


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(times: Sequence[float], base: Sequence[float]) -> Dict[str, float]:
    """Median and quartiles of the ratios of neighbours, and the median time in milliseconds."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, base)], n=4)
    return dict(ms=statistics.median(times) * 1e3, ratio=median, low=low, high=high)


def peak_mib(step: Callable) -> float:
    """The most memory that a step takes beyond what is there before it."""
    gc.collect()
    if torch.cuda.is_available():
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _wait()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / MIB


def markdown(rows: Sequence[Dict[str, object]]) -> str:
    """A table with a column for every key of the first row."""
    columns = list(rows[0])
    lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *([row[key] for key in columns] for row in rows)]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def machine(device: str, threads: int) -> Dict[str, str]:
    """What the figures depend on."""
    env = collect_env()
    name = env.get('GPU 0') if device == 'cuda' else _cpu_name()
    return dict(
        machine=f'{name}, {threads} threads' if device == 'cpu' else name,
        versions=f'Python {platform.python_version()}, PyTorch {torch.__version__}, mmdiffkd {mmdiffkd.__version__}',
        commit=get_git_hash(digits=7),
    )


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    names = [line for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return names[0].split(':')[1].strip() if names else platform.processor()


def publish(page: Path, title: str, text: str, command: str, where: Dict[str, str], rows, data) -> None:
    """Print a table, and write it as a page with the figures beside it as JSON."""
    table = markdown(rows)
    print(table)
    if page is None:
        return
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'# {title}', text, f'```shell\n{command}\n```', f'{where["machine"]}; {where["versions"]}.', table]
    page.write_text('\n\n'.join(lines) + '\n')
    page.with_suffix('.json').write_text(json.dumps(dict(where, command=command, results=data), indent=1) + '\n')
    print(f'{page} and {page.with_suffix(".json")} written.')
