"""Check configs: values, unknown and renamed keys, and keys in the wrong place.

The type annotations of a signature define which values are allowed. The decorator ``check_arguments`` compares the
arguments of a class with the annotations, and ``build_part`` builds an object from a nested config. Both raise a
:class:`ConfigError` with the path of the wrong key.
"""

import difflib
import functools
import inspect
import typing
from contextlib import contextmanager, suppress
from logging import WARNING
from math import inf, isfinite
from numbers import Integral, Real
from typing import Annotated, Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Union

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import Registry

from mmdiffkd.registry import closest_own

# keys of configs that have been renamed: {old name: new name}
RENAMED_KEYS = dict(
    backprop_steps='num_grad_steps',
    distance='loss_kd',
    floor='min_score',
    inherit='init_from_teacher',
    schedule='scheduler',
)

# arguments of the distiller that check_run_config() looks for at the top level of a config
DISTILLER_KEYS = ('distill', 'teacher', 'preset', 'init_from_teacher')


class ConfigError(ValueError):
    """A wrong value in a config.

    Args:
        key (str): The key, such as ``'loss_weight'``. :func:`in_key` adds the keys of the outer dicts.
        problem (str): Rest of the message after the key, such as ``'=-1 must be a number of at least 0.'``.
    """

    def __init__(self, key: str, problem: str):
        super().__init__(key, problem)
        self.key = key
        self.problem = problem
        # class that has the argument; the message starts with the class if the path of the key is unknown
        self.owner: Optional[str] = None

    def __str__(self):
        return f'{f"{self.owner}: " if self.owner else ""}{self.key}{self.problem}'


@contextmanager
def in_key(key: str) -> Iterator[None]:
    """Add an outer key to the path of each ConfigError that is raised in the ``with`` block.

    All other ValueErrors are converted to ConfigErrors with this key.
    """
    try:
        yield
    except ConfigError as error:
        error.key = f'{key}.{error.key}' if error.key else key
        error.owner = None
        raise
    except ValueError as error:
        raise ConfigError(key, f': {error}') from error


class Limits(NamedTuple):
    """Smallest and largest allowed value of a number. If ``above`` is True, ``low`` itself is not allowed."""

    low: float = -inf
    high: float = inf
    above: bool = False


NonNegative = Annotated[float, Limits(0)]
Positive = Annotated[float, Limits(0, above=True)]
Fraction = Annotated[float, Limits(0, 1)]
Natural = Annotated[int, Limits(0)]
# numbers of blocks and of channels have upper limits, because larger models would use up the memory
Count = Annotated[int, Limits(1, 1000)]
Channels = Annotated[int, Limits(1, 16384)]


def check_arguments(init: Callable) -> Callable:
    """Decorate an ``__init__`` so that each call checks its arguments against the annotations.

    Annotations may be classes, such as ``bool``, ``int``, ``float``, ``str`` and ``dict``, and ``Literal``,
    ``Optional``, ``Union`` or ``Sequence`` of these. ``Annotated`` adds :class:`Limits` to numbers. Numbers must be
    finite, and strings and sequences must not be empty.

    Raises:
        ValueError: If an argument is unknown or missing, or if a value does not fit its annotation. Raised by the
            decorated ``__init__``.
    """

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        name = type(self).__name__
        arguments = bind(init, name, (self, *args), kwargs)
        try:
            for key, value in arguments.items():
                check_value(key, value, _hints(init).get(key, Any))
            init(self, *args, **kwargs)
        except ConfigError as error:
            error.owner = error.owner or name
            raise

    return checked


def check_value(key: str, value, hint) -> None:
    """Check that the value of a key fits an annotation; see :func:`check_arguments`.

    Raises:
        ValueError: If the value does not fit the annotation.
    """
    if not _fits(value, hint):
        raise ConfigError(key, f'={value!r} must be {_expected(hint)}.')


def bind(function: Callable, name: str, args: tuple, kwargs: dict) -> dict:
    """Bind the arguments of a call to the parameters of a function, and check that none is unknown, renamed or missing.

    Args:
        function (callable): The function or class.
        name (str): Name of the function for the error message.
        args (tuple): Positional arguments of the call.
        kwargs (dict): Keyword arguments of the call.

    Returns:
        dict: The arguments by the name of their parameter.

    Raises:
        ValueError: If an argument is unknown or missing, or has an old name; see ``RENAMED_KEYS``.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in kwargs:
        if key not in parameters and not accepts_all:
            if key in RENAMED_KEYS and RENAMED_KEYS[key] in parameters:
                raise ConfigError(key, f" is now called '{RENAMED_KEYS[key]}'.")
            known = [other for other in parameters if other != 'self']
            nearest = f'; the nearest are {closest_names(key, known)}' if known else ''
            raise ConfigError(key, f' is not an argument of {name}{nearest}.')
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        missing = [
            key
            for key, parameter in list(parameters.items())[len(args) :]
            if parameter.default is parameter.empty and key not in kwargs and parameter.kind.name[:3] != 'VAR'
        ]
        if missing:
            raise ConfigError(missing[0], f' is missing: {name} needs it.') from None
        raise ConfigError('', f'{name} cannot be built: {error}.') from None


def build_part(registry: Registry, cfg: dict, key: str, default_type: Optional[str] = None, **defaults):
    """Build an object from a nested config.

    Args:
        registry (Registry): Registry that contains the class.
        cfg (dict): Config with ``type`` and the arguments of the class.
        key (str): Key of the config in the outer config, for error messages.
        default_type (str, optional): Class to use if the config has no ``type``. Defaults to None.
        **defaults: Default values of arguments. The config overrides them.

    Raises:
        ValueError: If the class is unknown, an argument is unknown or missing, or the class refuses a value.
    """
    with in_key(key):
        check_value('', cfg, dict)
        with registry.switch_scope_and_registry(cfg.get('_scope_')) as scoped:
            cls = find_class(scoped, cfg.get('type', default_type))
        name = getattr(cls, '__name__', str(cls))
        arguments = {**defaults, **{key: value for key, value in cfg.items() if key not in ('type', '_scope_')}}
        bind(cls, name, (), arguments)
        _check_numbers(cls, arguments)
        try:
            return cls(**arguments)
        except ValueError:
            raise
        except Exception as error:  # classes of OpenMMLab and of users raise various errors for wrong values
            raise ConfigError('', f': {name} cannot be built: {one_line(error)}') from error


def check_run_config(cfg: Config) -> None:
    """Check settings that would be ignored, or would fail later with an unclear message.

    Raises:
        ValueError: If a setting of the distiller is at the top level of the config and not in ``model``, or if
            ``custom_hooks`` is not a list.
    """
    model = cfg.get('model')
    for key in DISTILLER_KEYS if isinstance(model, dict) and 'student' in model else ():
        others = {name: value for name, value in cfg.items() if name != key}
        parts = cfg[key].values() if isinstance(cfg.get(key), dict) else [cfg.get(key)]
        # ignore a variable of the config file that is used elsewhere in the config: it may have any name
        if not cfg.get(key) or _is_part(cfg[key], others) or all(_is_part(part, others) for part in parts):
            continue
        text = f'{key} has no effect at the top level of the config: set it in the model, model=dict({key}=...).'
        if key not in model:
            raise ValueError(text)
        print_log(text, 'current', WARNING)  # no error: it may be a variable, and a child config has changed the model
    hooks = cfg.get('custom_hooks')
    if hooks is not None and not isinstance(hooks, (list, tuple)):
        raise ValueError('custom_hooks must be a list, such as custom_hooks=[dict(type=...)].')


def _is_part(value, cfg) -> bool:
    """Return whether a config equals a value or contains it at any depth."""
    if value == cfg:
        return True
    members = cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, (list, tuple)) else ()
    return any(_is_part(value, member) for member in members)


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, with a period at the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip('.') + '.'


def _check_numbers(cls: type, arguments: dict) -> None:
    """Check that arguments annotated as numbers are finite numbers, in a class that may not use ``check_arguments``.

    An argument is checked only if its default value is a number, too, because annotations of other packages may be
    wrong.
    """
    hints = {}
    with suppress(Exception):
        hints = _hints(cls.__init__)
    for key, parameter in inspect.signature(cls).parameters.items():
        is_number = hints.get(key) in (int, float) and isinstance(parameter.default, Real)
        if is_number and key in arguments and arguments[key] is not parameter.default:
            check_value(key, arguments[key], float)


def find_class(registry: Registry, kind):
    """Return the class that the ``type`` of a config names.

    Args:
        registry (Registry): Registry that contains the class.
        kind (str or type): Value of ``type``.

    Raises:
        ValueError: If no class with this name is registered. The message lists the nearest names.
    """
    if kind is None:
        raise ConfigError('type', ' is missing: set it to the name of a registered class.')
    cls = kind if callable(kind) else get_class(registry, kind)
    if cls is None:
        own = closest_own(str(kind), registry.name)  # prefer classes of mmdiffkd: other packages have similar names
        names = own or [f'{registry.scope}.{name}' for name in registry.module_dict]
        raise ConfigError(
            'type',
            f'={kind!r} is not a registered class; the nearest are {closest_names(str(kind), names)}. Import a class '
            'of your own with custom_imports.',
        )
    return cls


def get_class(registry: Registry, kind) -> Optional[Callable]:
    """Return the class that is registered under a name; None if the name belongs to no class."""
    cls = registry.get(kind) if isinstance(kind, str) and kind else None
    return cls if callable(cls) else None


@functools.cache
def _hints(init: Callable) -> dict:
    return typing.get_type_hints(init, include_extras=True)


def _fits(value, hint) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, inspect.Parameter.empty):
        return True
    if origin is Annotated:
        base, limits = arguments
        is_in = _fits(value, base) and limits.low <= value <= limits.high
        return is_in and not (limits.above and value == limits.low)
    if origin is Union:
        return any(_fits(value, choice) for choice in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if isinstance(origin, type) and issubclass(origin, typing.Sequence):
        is_list = isinstance(value, (list, tuple)) and len(value) > 0
        return is_list and all(_fits(entry, arguments[0]) for entry in value)
    if hint in (int, float):
        kind = Integral if hint is int else Real
        return isinstance(value, kind) and not isinstance(value, bool) and isfinite(value)
    if hint is str:
        return isinstance(value, str) and value != ''
    return isinstance(value, origin or hint)


def _expected(hint) -> str:
    """Describe the values that fit an annotation, for the end of a sentence with 'must be'."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, limits = arguments
        noun = _expected(base)
        if limits.high < inf:
            return f'{noun} from {limits.low:g} to {limits.high:g}'
        return f'{noun} greater than {limits.low:g}' if limits.above else f'{noun} of at least {limits.low:g}'
    if origin is Union:
        return _either([_expected(choice) for choice in arguments])
    if origin is typing.Literal:
        return f'{"one of " * (len(arguments) > 2)}{_either([repr(choice) for choice in arguments])}'
    if isinstance(origin, type) and issubclass(origin, typing.Sequence):
        entry = _expected(arguments[0])
        nouns = {
            'an integer': 'integers',
            'a non-empty string': 'non-empty strings',
            'a finite number': 'finite numbers',
        }
        return f'a non-empty list of {nouns[entry]}' if entry in nouns else f'a non-empty list, each entry {entry}'
    names = {bool: 'True or False', int: 'an integer', float: 'a finite number', str: 'a non-empty string'}
    names.update({dict: 'a dict', type(None): 'None'})
    return names.get(hint) or f'a {getattr(hint, "__name__", hint)}'


def _either(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f'{", ".join(choices[:-1])} or {choices[-1]}'


def closest_names(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates closest to ``name``, quoted and joined for an error message."""
    candidates = list(candidates)
    # candidates that differ from the name only in upper and lower case
    same = [candidate for candidate in candidates if candidate.lower() == name.lower()]
    found = same or difflib.get_close_matches(name, candidates, n=count, cutoff=0.4) or candidates[:count]
    return ', '.join(f"'{candidate}'" for candidate in found)
