import pytest
import torch

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.variants import Variant, VariantNeck
from mmdiffkd.models import FeatureDiffusion, NoiseInputs

VARIANTS = {
    name: {key: value for key, value in changes['neck'].items() if key != 'type'}
    for name, changes in METHODS.items()
    if changes and changes.get('neck', {}).get('type') == 'mmdiffkd.VariantNeck'
}
NOT_DENOISED = VARIANTS.pop('plus, not denoised')


def features():
    torch.manual_seed(1)
    return torch.randn(4, 8, 6, 5, requires_grad=True), torch.randn(4, 16, 6, 5)


def test_without_changes_it_is_the_papers():
    results = []
    for kind in (FeatureDiffusion, Variant):
        torch.manual_seed(0)
        part = kind(8, 16)
        student, teacher = features()
        losses = part(student, teacher).losses
        sum(losses.values()).backward()
        results.append((losses['loss_kd'], losses['loss_diffusion'], student.grad))
    for ours, papers in zip(*results):
        assert torch.equal(ours, papers)


@pytest.mark.parametrize('name', VARIANTS)
def test_student_and_diffusion_module_learn(name):
    torch.manual_seed(0)
    neck = VariantNeck([8], [16], **VARIANTS[name])
    student, teacher = features()
    (output,) = neck([student], [teacher])
    assert ((output.gamma > 0) & (output.gamma < 1)).all()
    output.losses['loss_kd'].backward(retain_graph=True)
    assert student.grad.abs().sum() > 0
    sum(output.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


def test_what_is_left_without_denoising():
    torch.manual_seed(0)
    (part,) = VariantNeck([8], [16], **NOT_DENOISED).levels
    student, teacher = features()
    output = part(student, teacher)
    torch.testing.assert_close(output.denoised, part.proj(part.align(student)))
    assert (output.gamma == 1).all() and output.losses['loss_diffusion'] == 0
    output.losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in part.denoiser.parameters())


def test_the_distance_does_not_train_a_detached_denoiser():
    part = Variant(8, 16, detach=True)
    student, teacher = features()
    part(student, teacher).losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in part.denoiser.parameters())
    assert all(parameter.requires_grad for parameter in part.denoiser.parameters())


def test_a_perfect_denoiser_finds_the_teacher():
    """Given x_t, the denoiser that knows x_0 predicts the noise that leads back to x_0."""
    part = Variant(16, 16, variance_preserving=True)
    part.proj = torch.nn.Identity()
    clean, noise = torch.randn(2, 4, 16, 6, 5)
    table = part.scheduler.alphas_cumprod

    class Perfect(torch.nn.Module):
        def forward(self, x, timesteps):
            a = table[timesteps].view(-1, 1, 1, 1)
            return (x - a.sqrt() * clean) / (1 - a).sqrt()

    part.denoiser = Perfect()
    part.align = torch.nn.Identity()
    part.align.out_channels = 16
    output = part(clean, clean, NoiseInputs(adapter_noise=noise))
    torch.testing.assert_close(output.denoised, clean, atol=1e-3, rtol=0)
