"""How the tools start and end. Nothing here imports torch: ``--help`` and mistyped arguments are answered at once."""

import atexit
import gc
import re
import sys
from contextlib import contextmanager
from typing import Iterator

MISTAKES = (ValueError, TypeError, OSError, ImportError, RuntimeError, SyntaxError)
UNKNOWN_TYPE = re.compile(r'([^\s\'"]+) is not in the \S+ registry')  # mmengine's KeyError


_is_own_process = False


@contextmanager
def without_gc() -> Iterator[None]:
    """Import packages and build models without garbage collection, which would take seconds and find next to nothing.

    >>> with without_gc():
    ...     from mmdiffkd.apis import preview
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _is_own_process:
            gc.freeze()
        if was_enabled:
            gc.enable()


def own_process() -> None:
    """Keep what is there after the start of a script out of later collections, the one at the end included.

    A script that runs in another's process changes nothing: the garbage of others would be kept, too.
    """
    global _is_own_process
    if sys.argv[0] in sys.orig_argv[1:]:
        _is_own_process = True
        atexit.register(gc.freeze)


@contextmanager
def exit_on_mistake() -> Iterator[None]:
    """End the process with the sentence of an error on stderr and code 2; what can only be a fault of ours is raised.

    >>> with exit_on_mistake():
    ...     config = student_config(read_config('my_config.py'))
    """
    try:
        yield
    except MISTAKES as error:
        _exit(str(error))
    except KeyError as error:
        unknown = UNKNOWN_TYPE.search(str(error))
        if unknown is None:
            raise
        _exit(f'{unknown[0]}: check how {unknown[1]} is spelt, or import its module by custom_imports.')


def _exit(sentence: str) -> None:
    print(f'Error: {sentence}', file=sys.stderr)
    sys.exit(2)
