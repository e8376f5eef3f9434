import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from mmdiffkd.models.distillers.recorders import ModuleOutputsRecorder, find_module


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


def test_none_outputs_keep_their_position():
    """Inception's auxiliary output is None in prediction."""
    recorder = ModuleOutputsRecorder(Toy(), ['head'], 'student')
    recorder.outputs['head'] = [[None, torch.randn(2, 4, 3, 3)]]
    assert [feature is None for feature in recorder.features('head', (12, 12))] == [True, False]


def test_output_without_tensors():
    class Strange(nn.Module):
        def forward(self, x):
            return dict(x='text', size=(3, 4))

    model = nn.Sequential(Strange())
    with pytest.raises(ValueError, match="tap '0' returns a dict"), ModuleOutputsRecorder(model, ['0'], 'student'):
        model(torch.randn(1))


def test_in_place_layers_do_not_change_the_feature():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)).eval()
    images = torch.randn(1, 3, 4, 4)
    with ModuleOutputsRecorder(model, ['0'], 'student') as taps:
        model(images)
    torch.testing.assert_close(taps.features('0', (4, 4))[0], model[0](images))
    assert taps.features('0', (4, 4))[0].requires_grad
