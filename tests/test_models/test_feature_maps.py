from collections import namedtuple
from dataclasses import dataclass
from typing import Optional

import pytest
import torch

from mmdiffkd.models.feature_maps import Tokens, as_map, flatten


@pytest.mark.parametrize(
    'shape, image, expected',
    [
        ((2, 4, 5, 6), (10, 12), (2, 4, 5, 6)),
        ((2, 4), (10, 12), (2, 4, 1, 1)),
        ((2, 196, 4), (224, 224), (2, 4, 14, 14)),
        ((2, 197, 4), (224, 224), (2, 4, 14, 14)),
        ((2, 50, 4), (40, 80), (2, 4, 5, 10)),
        ((2, 201, 4), (224, 224), (2, 4, 14, 14)),  # a class token and four register tokens
    ],
)
def test_as_map(shape, image, expected):
    assert as_map(torch.randn(shape), image, 'x').shape == expected


def test_class_token_is_dropped():
    tokens = torch.arange(5.0).view(1, 5, 1)
    assert as_map(tokens, (8, 8), 'x').flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    'shape, message',
    [
        ((2, 7, 4), '7 tokens, which do not form a grid'),
        ((2, 9, 4), '9 tokens, which do not form a grid'),
        ((2,), r'shape \(2,\)'),
    ],
)
def test_unsupported_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        as_map(torch.randn(shape), (8, 8), 'x')


def test_tokens_of_a_known_stride():
    patches = Tokens(stride=16, extra=0)
    assert as_map(torch.randn(2, 98, 4), (112, 224), 'x', patches).shape == (2, 4, 7, 14)
    # incomplete patches are dropped or padded
    assert as_map(torch.randn(2, 33 * 33 + 1, 4), (536, 536), 'x', Tokens(16, 1)).shape == (2, 4, 33, 33)
    assert as_map(torch.randn(2, 20, 4), (128, 144), 'x', Tokens(32, 0)).shape == (2, 4, 4, 5)
    with pytest.raises(
        ValueError, match=r'returns 49 tokens on images of 224x224, which do not form the grid of stride 16'
    ):
        as_map(torch.randn(2, 49, 4), (224, 224), 'x', patches)
    with pytest.raises(ValueError, match='returns 197 tokens'):  # one token too many
        as_map(torch.randn(2, 197, 4), (224, 224), 'x', patches)


def test_none_keeps_its_position():
    assert flatten((None, [torch.zeros(1, 2)]), 'x')[0] is None
    with pytest.raises(ValueError, match='returns a NoneType'):
        flatten(None, 'x')


@dataclass
class Output:
    last_hidden_state: torch.Tensor
    hidden_states: tuple = ()
    size: tuple = (4, 4)
    loss: Optional[torch.Tensor] = None


Named = namedtuple('Named', 'features mask')


@pytest.mark.parametrize(
    'wrap',
    [
        lambda a, b: dict(features=[a, dict(inner=(b,))], size=(3, 4), name='x'),
        lambda a, b: Output(a, (b,)),
        lambda a, b: Named([a, b], torch.ones(2, 4, 4, dtype=torch.bool)),
        lambda a, b: ([a], torch.tensor(1.0), [Output(b, ())]),
    ],
)
def test_nested_outputs(wrap):
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    found = [tensor for tensor in flatten(wrap(a, b), 'x') if tensor is not None]
    assert len(found) == 2 and found[0] is a and found[1] is b
