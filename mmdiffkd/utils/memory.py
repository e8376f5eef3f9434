"""Main memory of the machine."""

from contextlib import suppress
from pathlib import Path
from typing import Optional

CGROUP = Path('/sys/fs/cgroup')  # limits of the container


def available_memory() -> Optional[int]:
    """Return the bytes of main memory that are available, also within a container; None if unknown."""
    found = []
    with suppress(OSError, ValueError):  # not Linux
        lines = Path('/proc/meminfo').read_text('utf-8').splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable')]
    with suppress(OSError, ValueError):  # no container, or no limit
        limit, used = (int((CGROUP / f'memory.{name}').read_text('utf-8')) for name in ('max', 'current'))
        lines = (CGROUP / 'memory.stat').read_text('utf-8').splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith('inactive_file '))  # is freed on demand
        found.append(limit - used + cached)
    return min(found, default=None)


def check_memory(name: str, parameters: int, copies: int = 2) -> None:
    """Check that a model fits into memory before its weights are loaded.

    Args:
        name (str): Name of the teacher for the message.
        parameters (int): Number of parameters, of 4 bytes each.
        copies (int): Copies of the weights during loading: those of the file and those of the model. Defaults to 2.

    Raises:
        ValueError: If the estimate is larger than the available memory.
    """
    free, needed = available_memory(), 4 * copies * parameters
    if free is not None and needed > free:
        raise ValueError(
            f'The teacher ({name}) has {parameters / 1e6:,.0f} M parameters, and loading it takes about '
            f'{needed / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free: choose a smaller model.'
        )
