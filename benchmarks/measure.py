"""Utilities of the benchmarks: timing, peak memory, tables and pages."""

import json
import platform
import statistics
import textwrap
from pathlib import Path
from typing import Dict, Sequence

import torch
from mmengine.utils import get_git_hash
from mmengine.utils.dl_utils import collect_env

import mmdiffkd
from mmdiffkd.apis.costs import MIB, in_turn, peak_mib  # noqa: F401


def ratios(times: Sequence[float], base: Sequence[float]) -> Dict[str, float]:
    """Return the median time in milliseconds, and median and quartiles of the ratios to ``base`` within a round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, base)], n=4)
    return dict(ms=statistics.median(times) * 1e3, ratio=median, low=low, high=high)


def markdown(rows: Sequence[Dict[str, object]]) -> str:
    """Format rows as a Markdown table, with the keys of the first row as columns."""
    columns = list(rows[0])
    lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *([row[key] for key in columns] for row in rows)]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def machine(device: str, threads: int) -> Dict[str, str]:
    """Return name of the machine, versions and commit, to publish with a measurement."""
    env = collect_env()
    name = env.get('GPU 0') if device == 'cuda' else _cpu_name()
    return dict(
        machine=f'{name}, {threads} threads' if device == 'cpu' else name,
        versions=f'Python {platform.python_version()}, PyTorch {torch.__version__}, mmdiffkd {mmdiffkd.__version__}',
        commit=get_git_hash(digits=7),
    )


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    names = (
        [line for line in info.read_text('utf-8').splitlines() if line.startswith('model name')]
        if info.exists()
        else []
    )
    return names[0].split(':')[1].strip() if names else platform.processor()


def publish(page: Path, title: str, text: str, command: str, where: Dict[str, str], rows, data) -> None:
    """Print a table. With ``page``, also write the table to this file, and the data to a JSON file next to it."""
    table = markdown(rows)
    print(table)
    if page is None:
        return
    wrapped = ' \\\n    '.join(textwrap.wrap(command, 79, break_long_words=False, break_on_hyphens=False))
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'# {title}', text, f'```shell\n{wrapped}\n```', f'{where["machine"]}; {where["versions"]}.', table]
    page.write_text('\n\n'.join(lines) + '\n', encoding='utf-8')
    page.with_suffix('.json').write_text(
        json.dumps(dict(where, command=command, results=data), indent=1) + '\n', encoding='utf-8'
    )
    print(f'Wrote {page} and {page.with_suffix(".json")}.')
