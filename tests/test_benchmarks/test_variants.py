import pytest
import torch

from benchmarks.accuracy.variants import Variant, VariantNeck
from mmdiffkd.models import FeatureDiffusion, NoiseInputs

VARIANTS = ('detach', 'normalize', 'group_norm', 'variance_preserving')


def features():
    torch.manual_seed(1)
    return torch.randn(4, 8, 6, 5, requires_grad=True), torch.randn(4, 16, 6, 5)


def test_default_equals_feature_diffusion():
    results = []
    for kind in (FeatureDiffusion, Variant):
        torch.manual_seed(0)
        level = kind(8, 16)
        student, teacher = features()
        losses = level(student, teacher).losses
        sum(losses.values()).backward()
        results.append((losses['loss_kd'], losses['loss_diffusion'], student.grad))
    for expected, actual in zip(*results):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize('name', VARIANTS)
def test_student_and_diffusion_module_learn(name):
    torch.manual_seed(0)
    neck = VariantNeck([8], [16], **{name: True})
    student, teacher = features()
    (output,) = neck([student], [teacher])
    assert ((output.gamma > 0) & (output.gamma < 1)).all()
    output.losses['loss_kd'].backward(retain_graph=True)
    assert student.grad.abs().sum() > 0
    sum(output.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


def test_without_denoising():
    torch.manual_seed(0)
    (level,) = VariantNeck([8], [16], denoising=False).levels
    student, teacher = features()
    output = level(student, teacher)
    torch.testing.assert_close(output.denoised, level.proj(level.align(student)))
    assert (output.gamma == 1).all() and output.losses['loss_diffusion'] == 0
    output.losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in level.denoiser.parameters())


def test_detached_denoiser_is_not_trained_by_the_distillation_loss():
    level = Variant(8, 16, detach=True)
    student, teacher = features()
    level(student, teacher).losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in level.denoiser.parameters())
    assert all(parameter.requires_grad for parameter in level.denoiser.parameters())


def test_perfect_denoiser_recovers_the_teacher():
    """A denoiser that knows x_0 predicts, for any x_t, the noise that leads back to x_0."""
    level = Variant(16, 16, variance_preserving=True)
    level.proj = torch.nn.Identity()
    clean, noise = torch.randn(2, 4, 16, 6, 5)
    table = level.scheduler.alphas_cumprod

    class Perfect(torch.nn.Module):
        def forward(self, x, timesteps):
            a = table[timesteps].view(-1, 1, 1, 1)
            return (x - a.sqrt() * clean) / (1 - a).sqrt()

    level.denoiser = Perfect()
    level.align = torch.nn.Identity()
    level.align.out_channels = 16
    output = level(clean, clean, NoiseInputs(adapter_noise=noise))
    torch.testing.assert_close(output.denoised, clean, atol=1e-3, rtol=0)
