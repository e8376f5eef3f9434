"""Utilities of the benchmarks: timing, peak memory, and pages with data."""

import json
import statistics
from pathlib import Path
from typing import Dict, Sequence

from benchmarks.pages import machine, markdown, write_page  # noqa: F401
from mmdiffkd.apis.costs import MIB, in_turn, peak_mib  # noqa: F401


def ratios(times: Sequence[float], base: Sequence[float]) -> Dict[str, float]:
    """Return the median time in milliseconds, and the median and the quartiles of ``times / base`` over the rounds."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, base)], n=4)
    return dict(ms=statistics.median(times) * 1e3, ratio=median, low=low, high=high)


def publish(page: Path, title: str, text: str, command: str, where: Dict[str, str], rows, data) -> None:
    """Print a table. If ``page`` is given, also write the table to this file and the data to a JSON file next to it."""
    table = markdown(rows)
    print(table)
    if page is None:
        return
    write_page(page, title, text, command, where, rows)
    page.with_suffix('.json').write_text(
        json.dumps(dict(where, command=command, results=data), indent=1) + '\n', encoding='utf-8'
    )
    print(f'Wrote {page} and {page.with_suffix(".json")}.')
