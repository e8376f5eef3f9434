import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.accuracy.candidates import (
    Bridge,
    HeadJudgeNeck,
    NoisyGeneration,
    SkipDiffusion,
    rescale_channels,
)
from mmdiffkd.models import DistillContext, FixedGamma, PKDLoss
from mmdiffkd.models.losses.utils import normalize_channels
from tests.test_models.test_necks.test_crosskd_neck import SIDES, prepare


def features(channels=8):
    torch.manual_seed(1)
    return torch.randn(4, channels, 6, 5, requires_grad=True), torch.randn(4, 16, 6, 5)


def bridge_gradients(pull):
    """Return Z, R(Z), T and the gradient of Z."""
    torch.manual_seed(0)
    level = Bridge(16, 16, pull, dict(type='mmdiffkd.MSELoss', loss_weight=3.0))
    level.align = nn.Identity()
    nn.init.normal_(level.refiner[-1].weight, std=0.1)
    latent, teacher = features(16)
    output = level(latent, teacher)
    (gradient,) = torch.autograd.grad(output.losses['loss_kd'], latent, retain_graph=True)
    assert all(p.grad is None for p in level.refiner.parameters())
    assert torch.autograd.grad(output.losses['loss_refiner'], latent, allow_unused=True) == (None,)
    return latent.detach(), output.denoised, teacher, gradient


def test_gradients_of_the_bridge():
    scale = 2 * 3 / (4 * 16 * 6 * 5)
    latent, refined, teacher, through = bridge_gradients('through')
    torch.testing.assert_close(through, scale * (refined - teacher))
    *_, toward = bridge_gradients('refined')
    torch.testing.assert_close(toward, scale * (latent - refined))
    torch.testing.assert_close(through + toward, scale * (latent - teacher))
    *_, matched = bridge_gradients('teacher')
    assert matched.norm().item() == pytest.approx(through.norm().item(), rel=1e-5)
    assert F.cosine_similarity(matched.flatten(), (latent - teacher).flatten(), dim=0) > 0.9999


def test_bridge_starts_as_the_plain_distance():
    level = Bridge(8, 16, 'through')
    student, teacher = features()
    output = level(student, teacher)
    torch.testing.assert_close(output.denoised, level.align(student))
    torch.testing.assert_close(output.losses['loss_kd'], F.mse_loss(level.align(student), teacher))


def noisy_latents(max_timestep, scale=1.0):
    """Return the standardized student feature and the input of the generation."""
    torch.manual_seed(0)
    level = NoisyGeneration(8, 16, max_timestep)
    level.generation = nn.Identity()
    student, teacher = (level.detach() for level in features())
    with torch.no_grad():
        return normalize_channels(level.align(scale * student)), level(scale * student, teacher).student_latent


def test_student_cannot_change_the_level_of_the_noise():
    """The input of the generation has unit variance, whatever the scale of the student's feature."""
    noises = []
    for scale in (1.0, 1000.0):
        latent, noisy = noisy_latents(300, scale)
        assert noisy.std().item() == pytest.approx(1, abs=0.05)
        noises.append((noisy - latent).std().item())
    assert noises[0] > 0.1 and noises[1] == pytest.approx(noises[0], rel=0.1)


def test_generation_without_noise():
    latent, noisy = noisy_latents(0)
    assert (noisy - latent).std().item() == pytest.approx(0.01, rel=0.1)


def trained_skip_diffusion(**options):
    """Return a level whose network does not predict zero, as in the first iteration."""
    torch.manual_seed(0)
    level = SkipDiffusion(8, 16, **options)
    nn.init.normal_(level.layers[-1].weight, std=0.5)
    return level


def test_clean_feature_passes_unchanged():
    level = trained_skip_diffusion(noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=1.0))
    student, teacher = features()
    output = level(student, teacher)
    torch.testing.assert_close(output.denoised, normalize_channels(level.align(student)))
    torch.testing.assert_close(
        output.losses['loss_kd'], 2 * PKDLoss()(level.align(student), teacher), atol=1e-4, rtol=1e-4
    )
    output.losses['loss_kd'].backward()
    assert all(not p.grad.any() for p in level.layers.parameters() if p.grad is not None)


@pytest.mark.parametrize('gamma', [0.2, 0.5, 0.9])
def test_noise_level_of_the_denoiser_is_that_of_its_input(gamma):
    level = trained_skip_diffusion(noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=gamma))
    assert isinstance(level.noise_adapter, FixedGamma)
    calls = []

    def record(noisy, condition, signal, noise):
        calls.append((noisy, condition, signal, noise))
        return noisy

    level.denoise_once = record
    torch.manual_seed(1)
    with torch.no_grad():
        level(torch.randn(8, 8, 24, 24), torch.randn(8, 16, 24, 24))
    (noisy, latent, signal, noise), _ = calls
    torch.testing.assert_close(signal.square() + noise.square(), torch.ones_like(signal))
    assert noisy.std().item() == pytest.approx(1, abs=0.02)
    eps = (noisy - signal * latent) / noise
    assert eps.std().item() == pytest.approx(1, abs=0.02) and abs((eps * latent).mean()) < 0.02
    assert (signal / noise).mean().item() == pytest.approx(gamma / (1 - gamma), rel=1e-5)


def test_timestep_belongs_to_the_noise_level():
    level = trained_skip_diffusion()
    table, found = level.scheduler.alphas_cumprod, []
    level.time_embedding.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    x = torch.randn(3, 16, 4, 4)
    alphas = torch.stack([(table[t] + table[t + 1]) / 2 for t in (0, 99, 500)]).view(-1, 1, 1, 1)
    level.denoise_once(x, x, alphas.sqrt(), (1 - alphas).sqrt())
    assert found[0].tolist() == [1, 100, 501]


def test_all_parts_of_skip_diffusion_learn():
    level = trained_skip_diffusion()
    student, teacher = features()
    output = level(student, teacher)
    (gradient,) = torch.autograd.grad(output.losses['loss_diffusion'], student, retain_graph=True, allow_unused=True)
    assert gradient is None  # the diffusion loss does not change the student, although it is the condition
    sum(output.losses.values()).backward()
    assert student.grad.any() and all(p.grad is not None for p in level.parameters())
    assert 0 < output.gamma.min() and output.gamma.max() < 1


def test_head_judges_features_with_the_statistics_of_the_teacher():
    head, _, _ = prepare('RetinaNet')
    torch.manual_seed(0)
    theirs = [3 + 2 * torch.randn(2, 16, side, side) for side in (*SIDES[:3], 2, 2)]
    teacher = [*map(list, head(theirs)), theirs]
    neck = HeadJudgeNeck(
        [[16] * 5] * 3,
        [[level.size(1) for level in maps] for maps in teacher],
        num_convs=4,
        loss_feature=dict(type='mmdiffkd.PKDLoss'),
    )
    neck.adapter = nn.Identity()
    context = DistillContext(teacher=nn.Module())
    context.teacher.bbox_head = head

    def losses(features):
        outputs = neck([features] * 3, teacher, context)
        return {key: sum(output.losses[key] for output in outputs) for key in outputs[0].losses}

    same = losses([level / 7 - 1 for level in theirs])  # other statistics, but the same feature
    assert set(same) == {'loss_cls', 'loss_reg', 'loss_feature'}
    assert all(abs(loss) < 1e-3 for loss in same.values())
    student = [torch.randn_like(level).requires_grad_() for level in theirs]
    different = losses(student)
    assert all(different[key] > 10 * abs(same[key]) for key in same)
    (different['loss_cls'] + different['loss_reg']).backward()
    assert all(level.grad.any() for level in student) and all(p.grad is None for p in head.parameters())


def test_rescaled_channels():
    ours, theirs = torch.randn(2, 3, 4, 5), 2 + 3 * torch.randn(2, 3, 4, 5)
    rescaled = rescale_channels(ours, theirs)
    torch.testing.assert_close(rescaled.mean(dim=(0, 2, 3)), theirs.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(rescaled.std(dim=(0, 2, 3)), theirs.std(dim=(0, 2, 3)), rtol=1e-3, atol=0)
