"""Distill on a GPU: results of the CPU, mixed precision, compilation, memory formats, memory, and DDP with NCCL.

``--gpu-device cpu`` runs the same tests on the CPU, as far as the CPU supports what they test.
"""

import pytest
import torch
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner

from mmdiffkd.apis.costs import peak_mib
from mmdiffkd.models import FeatureDiffusionNeck, NoiseInputs
from tests import tiny
from tests.conftest import forget_globals, logged, run_tool
from tests.test_distributed.processes import dist_train
from tests.test_models.test_distillers.test_precision import CPUAmpOptimWrapper

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(request, monkeypatch):
    """Name of the device. Convolutions do not round to TF32, so that results are comparable with those of the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    return request.config.getoption('--gpu-device')


def run_neck(device, memory_format=torch.contiguous_format, **options):
    """Return the losses and gradients of a neck, on the CPU."""
    torch.manual_seed(0)
    sizes, channels = [(12, 16), (6, 8)], 8
    neck = FeatureDiffusionNeck([6, 6], [channels] * 2, **options).to(device)
    student, teacher, noise = [], [], []
    for size in sizes:
        student.append(torch.randn(2, 6, *size).to(device, memory_format=memory_format).requires_grad_())
        teacher.append(torch.randn(2, channels, *size).to(device, memory_format=memory_format))
        noises = torch.randn(2, 2, channels, *size).to(device)
        noise.append(NoiseInputs(*noises, torch.tensor([3, 900], device=device)))
    losses = [output.losses for output in neck(student, teacher, noise_inputs=noise)]
    sum(sum(level.values()) for level in losses).backward()
    gradients = [tensor.grad.cpu() for tensor in (*student, *neck.parameters())]
    return [{name: value.detach().cpu() for name, value in level.items()} for level in losses], gradients


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(memory_efficient=False),
        dict(num_grad_steps=1),
        dict(memory_format=torch.channels_last),
        dict(compile=True),
    ],
    ids=lambda options: '-'.join(options) or 'default',
)
def test_neck_matches_the_cpu(device, options):
    expected = {key: value for key, value in options.items() if key == 'num_grad_steps'}
    losses, gradients = run_neck(device, **options)
    expected_losses, expected_gradients = run_neck('cpu', **expected)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-4)
    for gradient, other in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-3 * max(other.abs().max().item(), 1))


@pytest.mark.parametrize(
    'options, tolerance',
    [(dict(), 1e-3), (dict(channels_last=False), 1e-3), (dict(compile=True), 1e-3), (dict(dtype='bfloat16'), 0.05)],
    ids=['default', 'contiguous', 'compile', 'bfloat16'],
)
def test_teacher_matches_the_cpu(tmp_path, device, options, tolerance):
    cfg = tiny.distiller_cfg(tmp_path)
    model = tiny.build(cfg)
    inputs, samples = tiny.batch(model)
    expected = model.diffkd_teacher.features(inputs, samples)['neck']
    model = tiny.build(tiny.ConfigDict(cfg, teacher=dict(cfg.teacher, **options))).to(device)
    for _ in range(2):  # the first batch optimizes the teacher
        features = model.diffkd_teacher.features(inputs.to(device), samples)['neck']
    for feature, other in zip(features, expected):
        torch.testing.assert_close(
            feature.cpu(), other, rtol=tolerance, atol=tolerance * other.abs().max().item(), check_stride=False
        )


def test_channels_last_student(tmp_path, device):
    """A student in channels-last memory format has the same losses."""
    model = tiny.build(tiny.distiller_cfg(tmp_path)).to(device)
    inputs, samples = tiny.batch(model)
    losses = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        torch.manual_seed(0)
        loss, log = model.parse_losses(model.loss(inputs.to(memory_format=memory_format), samples))
        loss.backward()
        losses.append({name: float(value) for name, value in log.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_memory_efficient_needs_less_memory(device):
    peaks = []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        neck = FeatureDiffusionNeck(64, 64, memory_efficient=memory_efficient).to(device)
        student, teacher = torch.randn(2, 2, 64, 64, 64, device=device).unbind()
        student.requires_grad_()

        def step():
            sum(neck(student, teacher).losses.values()).backward()  # noqa: B023

        step()
        neck.zero_grad(set_to_none=True)
        student.grad = None
        peaks.append(peak_mib(step))
    assert peaks[1] < 0.7 * peaks[0]


@pytest.fixture
def cpu_amp():
    OPTIM_WRAPPERS.register_module(module=CPUAmpOptimWrapper, force=True)
    yield
    OPTIM_WRAPPERS.module_dict.pop('CPUAmpOptimWrapper')


def run_cfg(folder, shapes, name, **options):
    """Return the config of a run of 12 iterations with a validation at its end."""
    (folder / name).mkdir()
    return tiny.run_cfg(
        tiny.distiller_cfg(folder / name),
        shapes,
        folder / name / f'run-{name}',
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=12, val_interval=12),
        param_scheduler=[],
        randomness=dict(seed=0),
        default_hooks__logger__interval=1,
        default_hooks__checkpoint=dict(type='mmdiffkd.CheckpointHook', by_epoch=False, interval=12),
        custom_hooks=[dict(type='mmdiffkd.NonFiniteHook')],
        **options,
    )


def train_losses(work_dir):
    return [record for record in logged(work_dir) if 'diffkd.fpn.loss_kd' in record]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision(tmp_path, shapes, device, cpu_amp, dtype):
    """The first losses are close to those in float32, training moves the weights, and the validation runs."""
    if device == 'cpu' and dtype == 'float16':
        pytest.skip('float16 needs a CUDA device')
    amp = dict(type='AmpOptimWrapper', dtype=dtype) if device == 'cuda' else dict(type='CPUAmpOptimWrapper')
    optimizer = dict(type='SGD', lr=0.01, momentum=0.9)
    logs = []
    for name, wrapper in (('full', dict(type='OptimWrapper')), ('amp', amp)):
        forget_globals()  # the second run has a visualizer of its own
        settings = dict(_delete_=True, optimizer=optimizer, **wrapper)
        runner = Runner.from_cfg(run_cfg(tmp_path, shapes, name, optim_wrapper=settings))
        weight, weights = runner.model.bbox_head.retina_cls.weight, []
        runner.model.backbone.register_forward_pre_hook(lambda *_: weights.append(weight.detach().clone()))  # noqa: B023
        runner.train()
        assert weight.device.type == device and not torch.equal(weights[0], weight)
        logs.append(train_losses(tmp_path / name / f'run-{name}'))
    assert len(logs[1]) == 12
    for key in ('loss_cls', 'loss_bbox', 'diffkd.fpn.loss_kd', 'diffkd.fpn.loss_diffusion'):
        assert logs[1][0][key] == pytest.approx(logs[0][0][key], rel=0.1, abs=0.02), key
    checkpoint = torch.load(tmp_path / 'amp' / 'run-amp' / 'iter_12.pth', map_location='cpu', weights_only=False)
    assert ('loss_scaler' in checkpoint['optimizer']) == (device == 'cuda')


def test_ddp(tmp_path, shapes, device):
    """One process with DDP, over NCCL on a GPU, has the losses of a process without DDP."""
    backend = 'nccl' if device == 'cuda' else 'gloo'
    cfg = run_cfg(tmp_path, shapes, 'ddp', env_cfg__dist_cfg__backend=backend)
    cfg.custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
    cfg.dump(tmp_path / 'config.py')
    done = dist_train(tmp_path / 'config.py', 1)
    assert done.returncode == 0, done.stdout[-4000:]
    run_tool('train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'single')
    distributed, single = train_losses(tmp_path / 'ddp' / 'run-ddp'), train_losses(tmp_path / 'single')
    assert len(distributed) == len(single) == 12
    for key in ('loss_cls', 'diffkd.fpn.loss_kd', 'diffkd.fpn.loss_diffusion'):
        assert distributed[0][key] == pytest.approx(single[0][key], rel=1e-3), key
