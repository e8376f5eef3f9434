"""Check the available main memory before a large model is loaded."""

from contextlib import suppress
from pathlib import Path
from typing import Optional

CGROUP = Path('/sys/fs/cgroup')  # folder with the memory limit of a container


def available_memory() -> Optional[int]:
    """Return the available main memory in bytes, within the limit of a container; None if it is unknown."""
    found = []
    with suppress(OSError, ValueError):  # the file exists only on Linux
        lines = Path('/proc/meminfo').read_text('utf-8').splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable')]
    with suppress(OSError, ValueError):  # there is no container, or it has no memory limit
        limit, used = (int((CGROUP / f'memory.{name}').read_text('utf-8')) for name in ('max', 'current'))
        lines = (CGROUP / 'memory.stat').read_text('utf-8').splitlines()
        # the kernel frees this file cache when a process needs memory
        cached = sum(int(line.split()[1]) for line in lines if line.startswith('inactive_file '))
        found.append(limit - used + cached)
    return min(found, default=None)


def check_memory(name: str, parameters: int, copies: int = 2) -> None:
    """Check that a model fits into memory before its weights are loaded.

    Args:
        name (str): Name of the teacher for the message.
        parameters (int): Number of parameters. Each takes 4 bytes.
        copies (int): Number of copies of the weights in memory during loading. Defaults to 2: the weights read from
            the file, and the weights of the model.

    Raises:
        ValueError: If loading would need more memory than is available.
    """
    free, needed = available_memory(), 4 * copies * parameters
    if free is not None and needed > free:
        raise ValueError(
            f'The teacher ({name}) has {parameters / 1e6:,.0f} M parameters, and loading it takes about '
            f'{needed / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free: choose a smaller model.'
        )
