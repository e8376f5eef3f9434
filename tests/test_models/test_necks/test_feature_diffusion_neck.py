import pytest
import torch

from mmdiffkd.models import Draws, FeatureDiffusionNeck
from tests import golden

NECK_FILES = golden.files('in/student')


def neck_from(data):
    """A neck whose widths, denoiser and steps are those of a reference file, with its weights."""
    weights = data.group('weight')
    latent = weights['align.weight'].size(0) if 'autoencoder.decoder.weight' in weights else None
    is_mlp = 'denoiser.layers.8.weight' in weights
    neck = FeatureDiffusionNeck(
        student_channels=data['in/student'].size(1),
        teacher_channels=data['in/teacher'].size(1),
        latent_channels=latent,
        denoiser=dict(type='mmdiffkd.MLPDenoiser') if is_mlp else None,
        noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter') if is_mlp else None,
        schedule=dict(
            num_train_timesteps=len(data['meta/alphas_cumprod']), num_inference_steps=len(data['meta/timesteps'])
        ),
    )
    neck.levels[0].load_state_dict(weights)
    return neck


@pytest.mark.parametrize('path', NECK_FILES, ids=lambda path: path.stem)
def test_reproduces_the_released_code(path):
    data = golden.Golden(path)
    neck = neck_from(data)
    level = neck.levels[0]
    assert level.schedule.timesteps == data['meta/timesteps'].tolist()
    torch.testing.assert_close(level.schedule.alphas_cumprod, data['meta/alphas_cumprod'])

    student = data['in/student'].requires_grad_()
    draws = Draws(data['draw/adapter_noise'], data['draw/diffusion_noise'], data['draw/diffusion_timesteps'].long())
    output = neck(student, data['in/teacher'], draws)
    torch.testing.assert_close(output.gamma, data['out/gamma'], **golden.TOLERANCE)
    torch.testing.assert_close(output.refined, data['out/refined'], **golden.TOLERANCE)
    torch.testing.assert_close(output.target, data['out/target'], **golden.TOLERANCE)
    expected = dict(
        loss_kd=data['out/loss_kd_mse'],
        loss_diffusion=data['out/loss_diffusion'],
        loss_reconstruction=data['out/loss_reconstruction'],
    )
    expected = {name: value.float() for name, value in expected.items() if not value.isnan()}
    assert set(output.losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value, **golden.TOLERANCE)

    sum(output.losses.values()).backward()
    gradients = data.group('grad')
    torch.testing.assert_close(student.grad, gradients.pop('student'), **golden.TOLERANCE)
    parameters = dict(level.named_parameters())
    assert set(parameters) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            parameters[name].grad, gradient, **golden.TOLERANCE, msg=lambda text, name=name: f'{name}: {text}'
        )
    buffers = dict(level.named_buffers())
    for name, value in data.group('buffer_after').items():
        torch.testing.assert_close(buffers[name], value, **golden.TOLERANCE)

    neck.eval()
    torch.testing.assert_close(
        neck(student, data['in/teacher'], draws).refined, data['out/refined_eval'], **golden.TOLERANCE
    )


def test_reference_files_are_there():
    assert NECK_FILES, f'no reference files in {golden.FOLDER}'


def test_levels_have_parts_of_their_own():
    neck = FeatureDiffusionNeck([4, 6], [8, 8])
    outputs = neck(
        [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)], [torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)]
    )
    assert [output.refined.shape for output in outputs] == [(2, 8, 8, 8), (2, 8, 4, 4)]
    first, second = neck.levels
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_uneven_levels():
    with pytest.raises(ValueError, match='one entry for every level'):
        FeatureDiffusionNeck([4, 4], [8])
    neck = FeatureDiffusionNeck([4, 4], [8, 8])
    with pytest.raises(ValueError, match='has 2 levels, but was given 1 of the student and 2 of the teacher'):
        neck([torch.randn(2, 4, 3, 3)], [torch.randn(2, 8, 3, 3)] * 2)
