"""Helpers of the command-line tools. This module does not import torch, so that ``--help`` returns at once."""

import atexit
import gc
import io
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Iterator

# errors that wrong arguments, configs or files cause
MISTAKES = (ValueError, TypeError, OSError, ImportError, RuntimeError, SyntaxError)
UNKNOWN_TYPE = re.compile(r'([^\s\'"]+) is not in the \S+ registry')  # in the KeyError of mmengine's registries


_is_own_process = False


@contextmanager
def without_gc() -> Iterator[None]:
    """Import packages and build models without garbage collection, which takes seconds and frees almost nothing.

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
    """Set up the process of a tool.

    Has no effect if a different program, such as a test, calls the tool in its process.

    - Characters that the terminal or a code page of Windows lacks are printed as escapes instead of raising an error.
    - Objects created at startup are excluded from later garbage collections, including the one at exit.
    """
    global _is_own_process
    if sys.argv[0] in sys.orig_argv[1:]:
        sys.stdout.reconfigure(errors='backslashreplace')
        _is_own_process = True
        atexit.register(gc.freeze)


def shorten_path(path: Path) -> Path:
    """Return a path relative to the working directory if it is inside, else the absolute path."""
    path, here = Path(path).absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextmanager
def quiet_packages() -> Iterator[None]:
    """Hide the output and the warnings of packages during imports and while models are built, but not errors.

    >>> with quiet_packages():
    ...     from mmdet.datasets import CocoDataset
    """
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@contextmanager
def exit_on_mistake() -> Iterator[None]:
    """On a user error, print its message to stderr and exit with code 2. Internal errors are raised.

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
        _exit(f'{unknown[0]}: check the spelling of {unknown[1]}, or import its module with custom_imports.')


def _exit(sentence: str) -> None:
    print(f'Error: {sentence}', file=sys.stderr)
    sys.exit(2)
