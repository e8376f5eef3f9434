import numpy as np
import torch


def assert_same(one, two, path=''):
    """Assert that nested values are bitwise equal.

    Args:
        one, two: Dicts, lists, tensors, arrays and plain values.
        path (str): Location of the values, for the message.
    """
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert list(one) == list(two), path
        for key in one:
            assert_same(one[key], two[key], f'{path}.{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for index, (left, right) in enumerate(zip(one, two)):
            assert_same(left, right, f'{path}.{index}')
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), f'{path}: {(one - two).abs().max()}'
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two), path
    else:
        assert one == two, f'{path}: {one} and {two}'
