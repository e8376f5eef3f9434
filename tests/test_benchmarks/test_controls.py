import pytest
import torch

from benchmarks.accuracy.controls import (
    DenoiserWithoutLastNorm,
    DetachedDiffusion,
    PlainRefinementNeck,
    RampedMSELoss,
)


def features():
    torch.manual_seed(1)
    return torch.randn(4, 8, 6, 5, requires_grad=True), torch.randn(4, 16, 6, 5)


def test_ramp_counts_iterations_and_continues_from_a_checkpoint():
    student, teacher = features()[1].requires_grad_(), torch.zeros(4, 16, 6, 5)
    loss = RampedMSELoss(2.0, start=0.5, end=1.5, length=4)
    base = 2 * student.square().mean()
    factors = [(loss(student, teacher) / base).item() for _ in range(3)]
    resumed = RampedMSELoss(2.0, start=0.5, end=1.5, length=4)
    resumed.load_state_dict(loss.state_dict())
    factors += [(resumed(student, teacher) / base).item() for _ in range(3)]
    assert factors == pytest.approx([0.5, 0.75, 1, 1.25, 1.5, 1.5])
    resumed.eval()(student, teacher)
    assert resumed.iteration == 6


def test_detached_denoiser_gives_a_gradient_of_one_factor():
    """The gradient is the same for every denoiser: gamma / sqrt(a) at the first timestep."""
    torch.manual_seed(0)
    options = dict(noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=0.5))
    for scheduler in (dict(num_inference_steps=1, start_timestep=400), dict(num_inference_steps=5)):
        level = DetachedDiffusion(8, 16, scheduler=scheduler, **options)
        latent = torch.randn(2, 16, 6, 5, requires_grad=True)
        sample, _ = level._denoise(latent, None, None)
        (gradient,) = torch.autograd.grad(sample.sum(), latent)
        factor = 0.5 * level.scheduler.alphas_cumprod[400] ** -0.5
        torch.testing.assert_close(gradient, factor.expand_as(gradient))
    losses = level(*features()).losses
    losses['loss_kd'].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in level.denoiser.parameters())
    losses['loss_diffusion'].backward()
    assert all(parameter.grad is not None for parameter in level.denoiser.parameters())


def test_denoiser_without_last_norm_keeps_the_size_of_its_prediction():
    torch.manual_seed(0)
    denoiser = DenoiserWithoutLastNorm(16)
    x, timesteps = torch.randn(4, 16, 6, 5), torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        before = denoiser(x, timesteps)
        denoiser.layers[-1].weight.mul_(0.5)
        denoiser.layers[-1].bias.mul_(0.5)
        torch.testing.assert_close(denoiser(x, timesteps), before / 2)


def test_refiner_learns_only_to_predict_the_teacher():
    torch.manual_seed(0)
    neck = PlainRefinementNeck([8], [16])
    (level,) = neck.levels
    student, teacher = features()
    (output,) = neck([student], [teacher])
    output.losses['loss_kd'].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in level.refiner.parameters())
    assert all(parameter.grad is not None for parameter in (*level.proj.parameters(), student, level.align.weight))
    before = student.grad.clone()
    output.losses['loss_refiner'].backward()
    assert torch.equal(student.grad, before)
    assert all(parameter.grad is not None for parameter in level.refiner.parameters())
