"""Helpers of the command-line tools. This module does not import torch, so that ``--help`` returns at once."""

import atexit
import gc
import io
import linecache
import re
import sys
import traceback
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Iterator, Optional

# errors of missing or invalid files and modules; they count as user errors, whichever module raises them
FILE_ERRORS = (OSError, ImportError, SyntaxError)
# modules of mmengine that check configs and the arguments of the classes in configs
CONFIG_CHECKS = ('mmengine.config', 'mmengine.registry', 'mmengine.runner')
UNKNOWN_TYPE = re.compile(r'([^\s\'"]+) is not in the \S+?::(\S+) registry')  # in the KeyError of mmengine's registries


_is_own_process = False


@contextmanager
def without_gc() -> Iterator[None]:
    """Turn off garbage collection during imports and model building: it takes seconds and frees almost nothing.

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

    The function has no effect if a different program, such as a test, calls the tool in its process.

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

    A user error is a ValueError that mmdiffkd or the calling script raises, an error of mmengine about a config, or a
    missing or invalid file or module.

    >>> with exit_on_mistake():
    ...     config = student_config(read_config('my_config.py'))
    """
    script = sys._getframe(2).f_code.co_filename  # the calling script; frame 1 is that of contextlib
    try:
        yield
    except Exception as error:
        sentence = _sentence(error, script)
        if sentence is None:
            raise
        print(f'Error: {sentence}', file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception, script: str) -> Optional[str]:
    """Return the message of a user error, None for internal errors."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if unknown := UNKNOWN_TYPE.search(text) if isinstance(error, KeyError) else None:
        from mmdiffkd.registry import closest_own

        own = closest_own(unknown[1], unknown[2])
        if own:
            return f"{unknown[0]}: the nearest is '{own[0]}'."
        return f'{unknown[0]}: check the spelling of {unknown[1]}, or import its module with custom_imports.'
    if isinstance(error, FILE_ERRORS):
        return text
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get('__name__')
    if module is None:  # the error is in a config: mmengine executes its code without a module name
        return f'The config cannot be read: {type(error).__name__} in line {line}: {text}'
    if isinstance(error, ValueError) and (module.split('.')[0] == 'mmdiffkd' or frame.f_code.co_filename == script):
        # a ValueError that no raise statement raises is a bug, such as unpacking too few values
        is_raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith('raise ')
        return text if is_raised else None
    is_about_config = module.startswith(CONFIG_CHECKS) and not isinstance(error, (AttributeError, AssertionError))
    return text if is_about_config and ' ' in text else None  # text without a space is only a key
