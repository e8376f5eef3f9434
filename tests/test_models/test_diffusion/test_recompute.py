import copy

import pytest
import torch
from torch import nn

from benchmarks.neck import plain
from mmdiffkd.models.diffusion import Bottleneck, BottleneckDenoiser, ConvChain, FeatureDiffusion, MLPDenoiser
from mmdiffkd.utils import saved_activation_bytes

CHAINS = {
    'bottleneck': lambda: BottleneckDenoiser(8, num_train_timesteps=4).layers,
    'mlp': lambda: MLPDenoiser(6, num_train_timesteps=4).layers,
    'one block': lambda: Bottleneck(8, 4).layers,
    'no bias': lambda: ConvChain(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
    'grouped': lambda: ConvChain(
        nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    ),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    torch.manual_seed(0)
    chain = CHAINS[request.param]().double()
    for module in chain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return chain


def run(chain, x, seed=1):
    """Output, and the gradients of input and weights."""
    x = x.clone().requires_grad_()
    output = chain(x)
    torch.manual_seed(seed)
    (output.float() * torch.randn(output.shape)).sum().backward()
    return {'': output.detach(), 'x': x.grad, **{name: p.grad for name, p in chain.named_parameters()}}


def feature(chain, dtype=torch.float64):
    torch.manual_seed(2)
    channels = next(chain.parameters()).size(1)
    width = channels * (chain[0].groups if isinstance(chain[0], nn.Conv2d) else 1)
    return torch.randn(2, width, 9, 7, dtype=dtype)


def is_lean(chain, x):
    return 'RecomputeFunction' in type(chain(x.clone().requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize('memory_efficient', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_same_results_and_gradients_as_a_sequential(chain, memory_efficient, training):
    x = feature(chain)
    reference = plain(chain).train(training)
    chain.train(training).memory_efficient = memory_efficient
    assert is_lean(copy.deepcopy(chain), x)
    torch.testing.assert_close(run(chain, x), run(reference, x))
    torch.testing.assert_close(chain.state_dict(), reference.state_dict())  # running statistics, too


@pytest.mark.parametrize('memory_efficient', [False, True])
def test_gradients_are_those_of_finite_differences(chain, memory_efficient):
    chain.memory_efficient = memory_efficient
    x = feature(chain)
    torch.autograd.gradcheck(chain, x.requires_grad_(), nondet_tol=1e-9)


def test_frozen_weights_get_no_gradient(chain):
    first, *rest = chain.parameters()
    for parameter in rest:
        parameter.requires_grad_(False)
    x = feature(chain)
    reference = plain(chain)
    for one in (chain, reference):
        one(x).square().sum().backward()
    torch.testing.assert_close(first.grad, next(reference.parameters()).grad)
    assert all(parameter.grad is None for parameter in rest)


@pytest.mark.parametrize('memory_efficient', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(chain, memory_efficient, dtype):
    """As near to float32 as the plain chain is, and all gradients in float32; on channels-last memory, as in use."""
    chain = chain.float()
    chain.memory_efficient = memory_efficient
    x = feature(chain, torch.float32).contiguous(memory_format=torch.channels_last)
    exact = run(plain(chain), x)
    results = []
    for one in (plain(chain), chain):
        with torch.autocast('cpu', dtype):
            results.append(run(one, x))
    for name, value in exact.items():
        ours, theirs = (result[name] for result in results[::-1])
        assert ours.dtype == theirs.dtype
        error, of_plain = ((one.float() - value).norm() for one in (ours, theirs))
        assert error <= 1.5 * of_plain + 0.02 * value.norm() + 1e-4, name


def test_what_it_cannot_run_runs_as_a_sequential(chain):
    x = feature(chain)
    reference = plain(chain)
    calls = []
    handle = next(m for m in chain.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    assert not is_lean(copy.deepcopy(chain), x)
    torch.testing.assert_close(run(chain, x), run(reference, x))
    handle.remove()
    assert is_lean(chain, x)
    for other in (nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(chain)), ConvChain(*chain, nn.GELU())):
        assert not is_lean(other.eval(), x)


@pytest.mark.parametrize('options', [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)])
def test_other_kinds_of_batch_norm_run_as_a_sequential(options):
    chain = ConvChain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, **options), nn.Conv2d(4, 4, 1)).double()
    x = feature(chain)
    reference = plain(chain)
    assert not is_lean(copy.deepcopy(chain), x)
    torch.testing.assert_close(run(chain, x), run(reference, x))


def test_no_gradient_wanted(chain):
    with torch.no_grad():
        assert chain.eval()(feature(chain)).grad_fn is None


@pytest.mark.parametrize('where', ['block', 'chain of the block', 'layer', 'forward of a layer'])
def test_whoever_watches_is_called(where):
    chain = CHAINS['bottleneck']()
    calls = []
    watched = {'block': chain[0], 'chain of the block': chain[0].layers}.get(where, chain[0].layers[0])
    if where == 'forward of a layer':
        forward = watched.forward
        watched.forward = lambda x: (calls.append(1), forward(x))[1]
    else:
        watched.register_full_backward_pre_hook(lambda *_: calls.append(1))
    chain(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert calls == [1]


def test_copies_and_checkpoints_are_those_of_a_sequential(chain):
    x = feature(chain)
    chain(x).sum().backward()
    chain.zero_grad()
    twin = copy.deepcopy(chain)
    torch.testing.assert_close(run(twin, x), run(chain, x))
    assert list(chain.state_dict()) == list(plain(chain).state_dict())


def test_one_value_a_channel_is_nothing_to_normalise():
    chain = CHAINS['bottleneck']()
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        chain(torch.randn(1, 8, 1, 1))
    assert all(buffer.isfinite().all() for buffer in chain.buffers())


def test_weights_changed_in_between_are_noticed(chain):
    output = chain(feature(chain))
    with torch.no_grad():
        next(chain.parameters()).add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        output.sum().backward()


def test_what_is_kept():
    """Autograd keeps 57 times the student's feature; less than half of that by default, and a quarter at the least."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 64, 16, 16, requires_grad=True), torch.randn(2, 64, 16, 16)
    kept = {}
    for mode in ('plain', 'default', 'memory_efficient'):
        level = FeatureDiffusion(64, 64, memory_efficient=mode == 'memory_efficient')
        level = plain(level) if mode == 'plain' else level
        kept[mode] = saved_activation_bytes(
            lambda level=level: level(student, teacher).losses, [*level.parameters(), teacher]
        )
    size = student.numel() * 4
    assert 50 * size < kept['plain'] < 60 * size
    assert kept['default'] < 0.5 * kept['plain']
    assert kept['memory_efficient'] < 0.25 * kept['plain']
