from collections import namedtuple
from dataclasses import dataclass
from typing import Optional

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from mmdiffkd.models.distillers.recorders import ModuleOutputsRecorder, Tokens, as_map, find_module, flatten


class Toy(nn.Module):
    """Model with a stem, and a head that is called once per level."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)
        self.after = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        levels = [self.head(x), self.head(x[..., ::2, ::2])]
        return [self.after(level) for level in levels]


def test_one_feature_per_call():
    model, images = Toy(), torch.randn(2, 3, 8, 8)
    with ModuleOutputsRecorder(model, ['stem', 'head'], 'student') as taps:
        model(images)
    assert [f.shape for f in taps.features('stem', (8, 8))] == [(2, 4, 8, 8)]
    assert [f.shape for f in taps.features('head', (8, 8))] == [(2, 2, 8, 8), (2, 2, 4, 4)]
    assert not model.stem._forward_hooks


def test_stops_after_the_last_tap():
    model = Toy()
    model.after.forward = None  # calling this module would fail
    with ModuleOutputsRecorder(model, ['stem', 'head'], 'teacher', stop_after=dict(stem=1, head=2)) as taps:
        model(torch.randn(2, 3, 8, 8))
    assert len(taps.outputs['head']) == 2


def test_hooks_are_removed_after_an_error():
    model = Toy()
    with pytest.raises(RuntimeError), ModuleOutputsRecorder(model, ['stem'], 'student'):
        model(torch.randn(2, 5, 8, 8))
    assert not model.stem._forward_hooks


def test_unknown_path_suggests_the_nearest():
    with pytest.raises(ValueError, match="teacher Toy has no module 'haed' to tap; the nearest are 'head'"):
        find_module(Toy(), 'haed', 'teacher')


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


def test_none_outputs_keep_their_position():
    """Inception's auxiliary output is None in prediction."""
    recorder = ModuleOutputsRecorder(Toy(), ['head'], 'student')
    recorder.outputs['head'] = [[None, torch.randn(2, 4, 3, 3)]]
    assert [feature is None for feature in recorder.features('head', (12, 12))] == [True, False]
    assert flatten((None, [torch.zeros(1, 2)]), 'x')[0] is None
    with pytest.raises(ValueError, match='returns a NoneType'):
        flatten(None, 'x')


def test_output_without_tensors():
    class Strange(nn.Module):
        def forward(self, x):
            return dict(x='text', size=(3, 4))

    model = nn.Sequential(Strange())
    with pytest.raises(ValueError, match="tap '0' returns a dict"), ModuleOutputsRecorder(model, ['0'], 'student'):
        model(torch.randn(1))


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


def test_in_place_layers_do_not_change_the_feature():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)).eval()
    images = torch.randn(1, 3, 4, 4)
    with ModuleOutputsRecorder(model, ['0'], 'student') as taps:
        model(images)
    torch.testing.assert_close(taps.features('0', (4, 4))[0], model[0](images))
    assert taps.features('0', (4, 4))[0].requires_grad
