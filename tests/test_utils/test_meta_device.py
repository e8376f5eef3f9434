import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn import functional as F

from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.utils import QuickInit, QuickMeta, build_for_inspection, build_on_meta, get_model_cfg, resolve_config

SWIN = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'


def test_drop_path_rates_on_the_meta_device():
    cfg = get_model_cfg(resolve_config(SWIN))
    with pytest.raises(RuntimeError, match='meta'), torch.device('meta'):
        torch.linspace(0, 1, 2)[1].item()
    net = build_on_meta(cfg)
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    rates = [block.ffn.dropout_layer.drop_prob for stage in net.backbone.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, cfg.backbone.drop_path_rate, 12).tolist())


@MODELS.register_module()
class LoadsInItsConstructor(nn.Module):
    """Loads weights in the constructor, which libraries such as transformers refuse on the meta device."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        if self.conv.weight.is_meta:
            raise RuntimeError('weights cannot be loaded on the meta device')

    def forward(self, images):
        return self.conv(images)


def test_constructor_that_fails_on_the_meta_device():
    state = torch.random.get_rng_state()
    net = build_for_inspection(dict(type='LoadsInItsConstructor'))
    assert all(weight.is_meta for weight in net.parameters())
    info = infer_feature_info(dict(type='LoadsInItsConstructor'), ['conv'], 'student')['conv']
    assert info.channels == [8] and info.requires_grad == [True]
    assert torch.equal(state, torch.random.get_rng_state())


def test_build_errors_are_raised():
    with pytest.raises(KeyError, match='Absent'):
        build_on_meta(dict(type='Absent'))
    with pytest.raises(KeyError, match='Absent'):
        build_for_inspection(dict(type='Absent'))


def test_quick_init_keeps_the_distribution():
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 512, 3).weight
    normal = torch.empty_like(plain).normal_(2, 3)
    with QuickInit():
        quick = nn.Conv2d(256, 512, 3).weight
        quick_normal = torch.empty_like(plain).normal_(2, 3)
    for ours, theirs in ((quick, plain), (quick_normal, normal)):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.03)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    filters = quick.flatten(1)
    assert len(torch.unique(filters, dim=0)) == len(filters)
    assert torch.linalg.matrix_rank(filters.detach()) == len(filters)


def test_quick_init_leaves_small_and_strided_tensors_to_torch():
    torch.manual_seed(0)
    expected = torch.rand(1000), torch.empty(600, 600).t()[::2].uniform_()
    torch.manual_seed(0)
    with QuickInit():
        found = torch.empty(1000).uniform_(), torch.empty(600, 600).t()[::2].uniform_()
    assert all(map(torch.equal, expected, found))


def run(training, dtype):
    """Return outputs and gradients of a small net that uses all operations of ``QuickMeta``."""
    x = torch.empty(2, 4, 6, 5, dtype=dtype, requires_grad=True)
    norm = nn.BatchNorm2d(4, dtype=dtype).train(training)
    y = F.relu(norm(x)) + x * 2 - x.clone()
    z = torch.addcmul(y, y, x) / (y + 1) * x.new_empty(4, 1, 1)
    z.transpose(2, 3).add(z.transpose(2, 3)).sum().backward()
    return [y, z, z + 1j, x.grad, norm.weight.grad, torch.empty(3, dtype=torch.long) / torch.empty(3, dtype=torch.long)]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_quick_meta_gives_the_same_shapes(training, dtype):
    with torch.device('meta'):
        expected = run(training, dtype)
        with QuickMeta():
            found = run(training, dtype)
    for ours, theirs in zip(found, expected):
        assert ours.is_meta and (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_quick_meta_computes_tensors_with_data():
    norm, x = nn.BatchNorm2d(3), torch.rand(2, 3, 4, 4)
    expected = norm(x) + x
    with QuickMeta():
        assert torch.equal(nn.BatchNorm2d(3)(x) + x, expected)
        with pytest.raises(RuntimeError):
            torch.empty(3, device='meta') + torch.rand(3)
