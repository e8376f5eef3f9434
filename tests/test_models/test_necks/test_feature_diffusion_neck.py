import copy

import pytest
import torch

from mmdiffkd.models import FeatureDiffusionNeck, NoiseInputs
from tests import golden

NECK_FILES = golden.files('in/student')


def build_neck(data, **options):
    """Build a neck with the channels, denoiser, steps and weights of a reference file."""
    weights = data.group('weight')
    latent = weights['align.weight'].size(0) if 'autoencoder.decoder.weight' in weights else None
    is_mlp = 'denoiser.layers.8.weight' in weights
    neck = FeatureDiffusionNeck(
        student_channels=data['in/student'].size(1),
        teacher_channels=data['in/teacher'].size(1),
        latent_channels=latent,
        denoiser=dict(type='mmdiffkd.MLPDenoiser') if is_mlp else None,
        noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter') if is_mlp else None,
        scheduler=dict(
            num_train_timesteps=len(data['meta/alphas_cumprod']), num_inference_steps=len(data['meta/timesteps'])
        ),
        **options,
    )
    neck.levels[0].load_state_dict(weights)
    return neck


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(memory_efficient=False),
        pytest.param(dict(compile=True), marks=pytest.mark.slow),
    ],
    ids=lambda options: ''.join(options) or 'default',
)
@pytest.mark.parametrize('path', NECK_FILES, ids=lambda path: path.stem)
def test_reproduces_the_released_code(path, options):
    data = golden.Golden(path)
    neck = build_neck(data, **options)
    level = neck.levels[0]
    # compiled kernels sum in a different order
    tolerance = dict(rtol=1e-3, atol=1e-4) if options.get('compile') else golden.TOLERANCE
    assert level.scheduler.timesteps == data['meta/timesteps'].tolist()
    torch.testing.assert_close(level.scheduler.alphas_cumprod, data['meta/alphas_cumprod'])

    student = data['in/student'].requires_grad_()
    noise_inputs = NoiseInputs(
        data['draw/adapter_noise'], data['draw/diffusion_noise'], data['draw/diffusion_timesteps'].long()
    )
    output = neck(student, data['in/teacher'], noise_inputs=noise_inputs)
    torch.testing.assert_close(output.gamma, data['out/gamma'], **tolerance)
    torch.testing.assert_close(output.denoised, data['out/refined'], **tolerance)
    torch.testing.assert_close(output.teacher_latent, data['out/target'], **tolerance)
    expected = dict(
        loss_kd=data['out/loss_kd_mse'],
        loss_diffusion=data['out/loss_diffusion'],
        loss_reconstruction=data['out/loss_reconstruction'],
    )
    expected = {name: value.float() for name, value in expected.items() if not value.isnan()}
    assert set(output.losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value, **tolerance)

    sum(output.losses.values()).backward()
    gradients = data.group('grad')
    torch.testing.assert_close(student.grad, gradients.pop('student'), **tolerance)
    parameters = dict(level.named_parameters())
    assert set(parameters) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            parameters[name].grad, gradient, **tolerance, msg=lambda text, name=name: f'{name}: {text}'
        )
    buffers = dict(level.named_buffers())
    for name, value in data.group('buffer_after').items():
        torch.testing.assert_close(buffers[name], value, **tolerance)

    neck.eval()
    torch.testing.assert_close(
        neck(student, data['in/teacher'], noise_inputs=noise_inputs).denoised, data['out/refined_eval'], **tolerance
    )


def test_reference_files_exist():
    assert NECK_FILES, f'no reference files in {golden.FOLDER}'


def test_levels_have_separate_modules():
    neck = FeatureDiffusionNeck([4, 6], [8, 8])
    outputs = neck(
        [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)], [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
    )
    assert [output.denoised.shape for output in outputs] == [(2, 8, 8, 8), (2, 8, 4, 4)]
    first, second = neck.levels
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_share_levels():
    neck = FeatureDiffusionNeck([6, 6], [8, 8], share_levels=True)
    student = [torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(2, 6, 4, 4, requires_grad=True)]
    teacher = [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
    assert len(list(neck.parameters())) == len(list(FeatureDiffusionNeck(6, 8).parameters()))
    outputs = neck(student, teacher)
    assert [output.denoised.shape for output in outputs] == [(2, 8, 8, 8), (2, 8, 4, 4)]
    sum(sum(output.losses.values()) for output in outputs).backward()
    assert all(feature.grad.any() for feature in student)
    with pytest.raises(ValueError, match=r'needs the same channels on all levels, but student_channels=\[4, 6\]'):
        FeatureDiffusionNeck([4, 6], [8, 8], share_levels=True)
    with pytest.raises(ValueError, match='has 2 levels, but received features of 1'):
        neck(student[:1], teacher[:1])


@pytest.mark.slow
def test_compiled_neck_supports_autocast_and_copies():
    """AMP, EMA and checkpoints work, also if shapes change as in multi-scale training."""
    torch.manual_seed(0)
    neck = FeatureDiffusionNeck([6, 6], [8, 8], compile=True)
    for size in (8, 12):
        student = [torch.randn(2, 6, size, size, requires_grad=True), torch.randn(2, 6, 4, 4, requires_grad=True)]
        teacher = [torch.randn(2, 8, size, size), torch.randn(2, 8, 4, 4)]
        with torch.autocast('cpu', torch.bfloat16):
            losses = [loss for output in neck(student, teacher) for loss in output.losses.values()]
        assert {loss.dtype for loss in losses} == {torch.float32}
        sum(losses).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
    copied = copy.deepcopy(neck)
    assert list(copied.state_dict()) == list(FeatureDiffusionNeck([6, 6], [8, 8]).state_dict())
    noise_inputs = [NoiseInputs(torch.randn_like(t), torch.randn_like(t), torch.tensor([3, 900])) for t in teacher]
    outputs, copied_outputs = (module.eval()(student, teacher, noise_inputs=noise_inputs) for module in (neck, copied))
    for expected, actual in zip(outputs, copied_outputs):
        torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-4, atol=1e-5)


def test_share_levels_under_autocast():
    """A single-pixel level must not reuse weights that autocast cached without gradient."""
    neck = FeatureDiffusionNeck([6, 6], [8, 8], share_levels=True)
    student = [torch.randn(1, 6, size, size, requires_grad=True) for size in (4, 1)]
    with torch.autocast('cpu', torch.bfloat16):
        outputs = neck(student, [torch.randn(1, 8, size, size) for size in (4, 1)])
    sum(outputs[1].losses.values()).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    'option', [dict(denoise=False), dict(memory_efficient=True)], ids=lambda option: next(iter(option))
)
def test_options_that_cannot_be_compiled(option):
    with pytest.raises(ValueError, match='compile=True needs denoise=True and memory_efficient=False'):
        FeatureDiffusionNeck(6, 8, compile=True, **option)


def test_different_numbers_of_levels():
    with pytest.raises(ValueError, match='one entry per level'):
        FeatureDiffusionNeck([4, 4], [8])
    neck = FeatureDiffusionNeck([4, 4], [8, 8])
    with pytest.raises(ValueError, match='features of 1 levels from the student and 2 from the teacher'):
        neck([torch.randn(2, 4, 3, 3)], [torch.randn(2, 8, 3, 3)] * 2)
