from typing import Annotated, Literal, Optional, Sequence, Union

import pytest
from mmengine.registry import Registry
from torch import nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import (
    ConfigError,
    Limits,
    NonNegative,
    build_part,
    check_arguments,
    check_value,
    closest_names,
    in_key,
)

NAN, INF = float('nan'), float('inf')


class Part:
    @check_arguments
    def __init__(self, channels: int, weight: NonNegative = 1.0, mode: Literal['a', 'b'] = 'a', scheduler=None):
        self.weight = weight


@pytest.mark.parametrize(
    'hint, good, bad',
    [
        (bool, [True, False], [0, 1, 'True', None]),
        (int, [0, -3], [True, 1.0, '1', NAN]),
        (float, [0, -1.5], [True, NAN, INF, '1', [1.0]]),
        (str, ['a'], ['', 1, None]),
        (Annotated[int, Limits(1, 5)], [1, 5], [0, 6, 2.0, True]),
        (Annotated[float, Limits(0, above=True)], [0.1], [0, -1, NAN]),
        (Optional[int], [None, 3], [False, 'None']),
        (Union[str, Sequence[str]], ['a', ['a', 'b'], ('a',)], [[], ['a', 1], {}, None]),
        (Literal['a', None], ['a', None], ['b', 0]),
        (dict, [{}, dict(a=1)], [[], None]),
    ],
)
def test_values_fit_annotations(hint, good, bad):
    for value in good:
        check_value('key', value, hint)
    for value in bad:
        with pytest.raises(ConfigError, match='^key='):
            check_value('key', value, hint)


@pytest.mark.parametrize(
    'hint, expected',
    [
        (NonNegative, 'a finite number of at least 0'),
        (Annotated[int, Limits(1, 5)], 'an integer from 1 to 5'),
        (Annotated[float, Limits(0, above=True)], 'a finite number greater than 0'),
        (Literal['a', 'b', 'c'], "one of 'a', 'b' or 'c'"),
        (Union[str, Sequence[str], None], 'a non-empty string, a non-empty list of non-empty strings or None'),
    ],
)
def test_messages_describe_what_fits(hint, expected):
    with pytest.raises(ConfigError) as error:
        check_value('key', -1, hint)
    assert str(error.value) == f'key=-1 must be {expected}.'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(channels=1, weight=-1), 'Part: weight=-1 must be a finite number of at least 0.'),
        (dict(channels=1, wieght=1), "wieght is not an argument of Part; the nearest are 'weight'."),
        (dict(channels=1, schedule={}), "schedule is now called 'scheduler'."),
        (dict(), 'channels is missing: Part needs it.'),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ConfigError) as error:
        Part(**arguments)
    assert str(error.value) == message


def test_errors_contain_the_path():
    with pytest.raises(ConfigError) as error:
        with in_key('distill.fpn'), in_key('neck'):
            Part(1, mode='c')
    assert str(error.value) == "distill.fpn.neck.mode='c' must be 'a' or 'b'."
    with pytest.raises(ConfigError, match='^neck: too small$'):
        with in_key('neck'):
            raise ValueError('too small')


def test_build_part_applies_defaults():
    part = build_part(MODELS, {}, 'loss_kd', 'mmdiffkd.MSELoss', loss_weight=3.0)
    assert type(part).__name__ == 'MSELoss' and part.loss_weight == 3.0
    assert build_part(MODELS, dict(loss_weight=2), 'loss_kd', 'mmdiffkd.MSELoss', loss_weight=3.0).loss_weight == 2


@pytest.mark.parametrize(
    'cfg, message',
    [
        ([], r'^loss_kd=\[\] must be a dict'),
        (dict(type='mmdiffkd.MSELos'), "^loss_kd.type='mmdiffkd.MSELos' is not a registered class; .*mmdiffkd.MSELoss"),
        (dict(type='math'), "^loss_kd.type='math' is not a registered class"),
        (dict(type=''), "^loss_kd.type='' is not a registered class"),
        (dict(type=3), '^loss_kd.type=3 is not a registered class'),
        (dict(), '^loss_kd.type is missing'),
        (dict(type='mmdet.L1Loss', loss_weight='abc'), "^loss_kd.loss_weight='abc' must be a finite number"),
        (dict(type='mmdet.L1Loss', weight=1), '^loss_kd.weight is not an argument of L1Loss'),
        (dict(type=nn.Conv2d, in_channels=1), '^loss_kd.out_channels is missing: Conv2d needs it'),
    ],
)
def test_build_part_refuses(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build_part(MODELS, cfg, 'loss_kd')


def test_errors_of_other_classes_become_one_sentence():
    registry = Registry('part')

    @registry.register_module()
    class Strange:
        def __init__(self, size):
            raise RuntimeError(f'cannot use {size}\nTraceback ...')

    with pytest.raises(ConfigError) as error:
        build_part(registry, dict(type='Strange', size=3), 'neck')
    assert str(error.value) == 'neck: Strange cannot be built: cannot use 3.'
    assert isinstance(error.value.__cause__, RuntimeError)


def test_closest_name_that_differs_in_case():
    assert closest_names('CWD', ['at', 'bckd', 'cwd']) == "'cwd'"
