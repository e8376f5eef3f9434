import weakref

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.models import FeatureDiffusion, NoiseInputs
from mmdiffkd.models.diffusion.feature_diffusion import try_loss
from mmdiffkd.utils import saved_activation_bytes
from mmdiffkd.utils.check_config import ConfigError


def features(student=6, teacher=8, size=(5, 7)):
    return torch.randn(2, student, *size, requires_grad=True), torch.randn(2, teacher, *size, requires_grad=True)


def test_teacher_gets_no_gradient():
    student, teacher = features()
    level = FeatureDiffusion(6, 8, latent_channels=4)
    sum(level(student, teacher).losses.values()).backward()
    assert teacher.grad is None
    assert student.grad.any()
    assert all(p.grad is not None for p in level.parameters())


def test_kd_loss_trains_the_denoiser_and_not_the_autoencoder():
    student, teacher = features()
    level = FeatureDiffusion(6, 8, latent_channels=4)
    level(student, teacher).losses['loss_kd'].backward()
    assert level.denoiser.time_embedding.weight.grad[[0, 100, 200, 300, 400]].abs().sum(1).all()
    assert all(p.grad is None for p in level.autoencoder.parameters())


def test_noise_is_random_or_given():
    student, teacher = features()
    level = FeatureDiffusion(6, 8).eval()
    noise_inputs = NoiseInputs(torch.randn(2, 8, 5, 7), torch.randn(2, 8, 5, 7), torch.tensor([3, 900]))
    first, second = level(student, teacher, noise_inputs), level(student, teacher, noise_inputs)
    torch.testing.assert_close(first.losses, second.losses)
    assert level(student, teacher).losses['loss_kd'] != level(student, teacher).losses['loss_kd']


def test_gamma_one_adds_no_noise():
    student, teacher = features()
    level = FeatureDiffusion(6, 8).eval()
    with torch.no_grad():
        level.noise_adapter.pred.bias.copy_(torch.tensor([100.0, -100.0]))
    denoised = [level(student, teacher).denoised for _ in range(2)]
    torch.testing.assert_close(*denoised)


def test_denoise_false_only_aligns_and_compares():
    student, teacher = features()
    level = FeatureDiffusion(6, 8, denoise=False)
    output = level(student, teacher)
    assert [name for name, _ in level.named_parameters()] == ['align.weight', 'align.bias']
    expected = torch.nn.functional.mse_loss(level.align(student), teacher.detach())
    torch.testing.assert_close(output.losses, dict(loss_kd=expected))
    assert output.gamma is None


def test_align_false_compares_features_directly():
    student, teacher = features(8, 8)
    level = FeatureDiffusion(8, 8, denoise=False, align=False)
    assert not list(level.parameters())
    torch.testing.assert_close(level(student, teacher).losses['loss_kd'], (student - teacher).square().mean())


def test_student_is_resized_to_the_teacher():
    student, teacher = torch.randn(2, 6, 5, 7), torch.randn(2, 8, 10, 14)
    assert FeatureDiffusion(6, 8)(student, teacher).denoised.shape == teacher.shape


def test_losses_are_float32_under_autocast():
    student, teacher = features()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = FeatureDiffusion(6, 8, latent_channels=4)(student, teacher)
    assert {loss.dtype for loss in output.losses.values()} == {torch.float32}


def test_loss_weights():
    student, teacher = features()
    noise_inputs = NoiseInputs(torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7), torch.tensor([3, 900]))
    torch.manual_seed(0)
    plain = FeatureDiffusion(6, 8, latent_channels=4)
    torch.manual_seed(0)
    weighted = FeatureDiffusion(
        6,
        8,
        latent_channels=4,
        loss_diffusion_weight=2.0,
        loss_reconstruction_weight=3.0,
        loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=5.0),
    )
    expected, losses = plain(student, teacher, noise_inputs).losses, weighted(student, teacher, noise_inputs).losses
    for name, factor in dict(loss_diffusion=2.0, loss_reconstruction=3.0, loss_kd=5.0).items():
        torch.testing.assert_close(losses[name], factor * expected[name])


def test_one_value_per_channel_trains():
    """The last batch of an epoch can have one image; BatchNorm needs more than one value per channel."""
    level = FeatureDiffusion(6, 8, latent_channels=4)
    output = level(torch.randn(1, 6, 1, 1), torch.randn(1, 8, 1, 1))
    sum(output.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in level.parameters())
    assert all(module.training for module in level.modules())


def test_one_value_per_channel_keeps_frozen_batch_norms_in_eval_mode():
    level = FeatureDiffusion(6, 8)
    norms = [module for module in level.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    level(torch.randn(1, 6, 1, 1), torch.randn(1, 8, 1, 1))
    assert not any(norm.training for norm in norms) and level.training


def gradients(level, *inputs):
    """Return the losses and the gradients of the student and the weights, with fixed noise."""
    student, teacher = inputs
    student = student.detach().clone().requires_grad_()
    torch.manual_seed(4)
    losses = level(student, teacher).losses
    sum(losses.values()).backward()
    return losses, student.grad, {name: p.grad for name, p in level.named_parameters()}


@MODELS.register_module()
class PlainDenoiser(nn.Module):
    """A custom denoiser of plain modules."""

    def __init__(self, channels, num_train_timesteps=1000):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x, timesteps):
        return self.layer(x)


@pytest.mark.parametrize('prediction_type', ['sample', 'v_prediction'])
def test_prediction_types_train_all_modules(prediction_type):
    level = FeatureDiffusion(6, 8, scheduler=dict(prediction_type=prediction_type))
    sum(level(*features()).losses.values()).backward()
    assert all(p.grad is not None for p in level.parameters())


def seed_everything(module):
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


CHECKPOINTED = {
    'default': dict(),
    'own denoiser': dict(denoiser=dict(type='PlainDenoiser')),
    'logits': dict(denoiser=dict(type='mmdiffkd.MLPDenoiser'), noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter')),
    'autoencoder': dict(latent_channels=4),
    'last step': dict(num_grad_steps=1),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('options', CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_memory_efficient_changes_no_result(options, training, dtype):
    """Losses, gradients and running statistics are bitwise equal with and without it, also under autocast."""
    inputs, results = features(), []
    for memory_efficient in (False, True):
        level = seed_everything(FeatureDiffusion(6, 8, memory_efficient=memory_efficient, **options)).train(training)
        torch.manual_seed(0)
        with torch.autocast('cpu', dtype, enabled=dtype is not torch.float32):
            results.append((*gradients(level, *inputs), dict(level.named_buffers())))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize('options', [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)])
def test_memory_efficient_with_settings_of_batch_norm(options):
    inputs, results = features(), []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        level = FeatureDiffusion(6, 8, memory_efficient=memory_efficient)
        level.proj[1] = nn.BatchNorm2d(8, **options)
        torch.manual_seed(0)
        results.append((*gradients(level, *inputs), dict(level.named_buffers())))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert level.proj[1].momentum == nn.BatchNorm2d(8, **options).momentum


def test_memory_efficient_allows_several_backward_passes():
    """Statistics are updated once, and each loss can be differentiated on its own."""
    (student, teacher), grads = features(), []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        level = FeatureDiffusion(6, 8, memory_efficient=memory_efficient)
        torch.manual_seed(0)
        losses = level(student, teacher).losses
        weight = level.denoiser.time_embedding.weight
        parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses.values()]
        grads.append((*parts, torch.autograd.grad(sum(losses.values()), student)[0], dict(level.named_buffers())))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_memory_efficient_saves_few_activations():
    """Autograd saves 57 times the size of the student's feature; with ``memory_efficient``, 12 times."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 64, 16, 16, requires_grad=True), torch.randn(2, 64, 16, 16)
    saved = {}
    for memory_efficient in (False, True):
        level = FeatureDiffusion(64, 64, memory_efficient=memory_efficient)
        saved[memory_efficient] = saved_activation_bytes(
            lambda level=level: level(student, teacher).losses, [*level.parameters(), teacher]
        )
    size = student.numel() * 4
    assert 50 * size < saved[False] < 60 * size
    assert saved[True] < 13 * size


def test_trajectory_is_kept_only_on_request():
    """By default, the samples of the denoising steps are freed in the forward pass."""
    student, teacher = features()
    level = FeatureDiffusion(6, 8)
    noised = []
    level.denoiser.register_forward_pre_hook(lambda module, args: noised.append(args[0]))
    output = level(student, teacher, return_trajectory=True)
    assert len(output.trajectory) == 6
    for sample, expected in zip(output.trajectory, noised[:5]):  # the denoiser's sixth call is for the diffusion loss
        torch.testing.assert_close(sample, expected)

    alive = []
    level = FeatureDiffusion(6, 8, memory_efficient=False)  # True saves the samples to recompute
    step = level.scheduler.step

    def recorded_step(*args):
        sample = step(*args)
        alive.append(weakref.ref(sample))
        return sample

    level.scheduler.step = recorded_step
    output = level(student, teacher)
    assert not output.trajectory and len(alive) == 5 and not any(sample() is not None for sample in alive[:-1])


def test_gradient_through_the_last_steps_only():
    """Earlier steps backpropagate past the denoiser, so the student still gets a gradient, scaled by the schedule."""
    student, teacher = features()
    level = FeatureDiffusion(6, 8, num_grad_steps=1)
    level(student, teacher).losses['loss_kd'].backward()
    used = level.denoiser.time_embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [0]
    assert student.grad.any()

    torch.manual_seed(0)
    full = FeatureDiffusion(6, 8)
    torch.manual_seed(0)
    all_steps = FeatureDiffusion(6, 8, num_grad_steps=5)
    torch.testing.assert_close(gradients(full, student, teacher), gradients(all_steps, student, teacher))
    assert full.scheduler.timesteps == [400, 300, 200, 100, 0]


def test_gradient_through_the_last_steps_under_autocast():
    """Later steps must not reuse weights that autocast cached in steps without gradient."""
    student, teacher = features()
    level = FeatureDiffusion(6, 8, num_grad_steps=1, memory_efficient=False)
    with torch.autocast('cpu', torch.bfloat16):
        losses = level(student, teacher).losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in level.parameters())


@pytest.mark.parametrize('denoise', [True, False])
def test_distance_may_call_view(denoise):
    class Flat(nn.Module):
        def forward(self, student, teacher):
            return (student.view(2, 8, 35) - teacher.view(2, 8, 35)).abs().mean()

    student, teacher = features()
    level = FeatureDiffusion(6, 8, denoise=denoise)
    level.loss_kd = Flat()
    assert level(student, teacher).losses['loss_kd'] > 0


def test_gradient_past_the_denoiser_follows_the_schedule():
    """If the prediction is constant, the gradient contains only the scales of the steps."""
    student, teacher = features()
    levels = []
    for steps in (1, 5):
        torch.manual_seed(0)
        levels.append(FeatureDiffusion(6, 8, num_grad_steps=steps))
        nn.init.zeros_(levels[-1].denoiser.layers[-1].weight)
    last_step, all_steps = (gradients(level, student, teacher)[1] for level in levels)
    torch.testing.assert_close(last_step, all_steps)


def test_different_batch_sizes():
    with pytest.raises(ValueError, match=r'\(1, 6, 5, 7\) and teacher \(2, 8, 5, 7\) must have the same batch size'):
        FeatureDiffusion(6, 8)(torch.randn(1, 6, 5, 7), torch.randn(2, 8, 5, 7))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(denoise=False, latent_channels=4), 'latent_channels=4 has no effect'),
        (dict(align=False), 'align=False needs denoise=False'),
        (dict(denoise=False, num_grad_steps=1), 'num_grad_steps=1 has no effect with denoise=False'),
        (dict(num_grad_steps=0), 'num_grad_steps=0 must be between 1 and scheduler.num_inference_steps=5'),
        (dict(num_grad_steps=6), 'num_grad_steps=6 must be between 1 and'),
        (dict(denoise=False, align=False), 'the student has 6 channels and the teacher has 8'),
    ],
)
def test_incompatible_options(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureDiffusion(6, 8, **options)


def test_class_losses_need_equal_classes():
    for distance in ('KLDivergence', 'DISTLoss'):
        with pytest.raises(ValueError, match='class by class, but the student has 19 classes and the teacher 150; tap'):
            FeatureDiffusion(19, 150, loss_kd=dict(type=f'mmdiffkd.{distance}'))


def test_class_losses_need_several_channels():
    with pytest.raises(ValueError, match='compares distributions over classes, but there is only one channel'):
        FeatureDiffusion(1, 1, loss_kd=dict(type='mmdiffkd.DISTLoss'))


def test_map_is_pooled_if_the_other_feature_is_a_vector():
    """A vector is compared with the mean of a map, not with its center pixel."""
    level = FeatureDiffusion(6, 6, denoise=False, align=False)
    vector, feature = torch.randn(2, 6, 1, 1), torch.randn(2, 6, 5, 7)
    expected = nn.functional.mse_loss(vector, feature.mean(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(level(vector, feature).losses['loss_kd'], expected)
    torch.testing.assert_close(level(feature, vector).losses['loss_kd'], expected)


@pytest.mark.parametrize('denoise', [True, False])
def test_mask_is_resized_to_the_feature(denoise):
    torch.manual_seed(0)
    student, teacher = features(4, 4, size=(4, 6))
    level = FeatureDiffusion(4, 4, denoise=denoise, loss_kd=dict(type='mmdiffkd.KLDivergence')).eval()
    mask = torch.ones(2, 1, 32, 48, dtype=torch.bool)
    mask[:, :, :, 24:] = False
    noise_inputs = NoiseInputs(torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6), torch.tensor([3, 900]))
    output = level(student, teacher, noise_inputs, mask)
    expected = level.loss_kd(output.denoised[..., :3], output.teacher_latent[..., :3])
    torch.testing.assert_close(output.losses['loss_kd'], expected)
    plain = FeatureDiffusion(4, 4, denoise=denoise).eval()  # distances between features do not take a mask
    torch.testing.assert_close(
        plain(student, teacher, noise_inputs, mask).losses, plain(student, teacher, noise_inputs).losses
    )


@pytest.mark.parametrize('kind', ['IoULoss', 'GIoULoss'])
def test_losses_for_boxes_are_refused(kind):
    import mmdet.models  # noqa: F401

    with pytest.raises(ConfigError, match=rf'loss_kd: {kind}\(\) does not run on random features'):
        FeatureDiffusion(8, 8, loss_kd=dict(type=f'mmdet.{kind}'))


@pytest.mark.parametrize('channels', [5, 8, 64])
def test_losses_of_the_first_channels_are_refused(channels):
    import mmdet.models  # noqa: F401

    with pytest.raises(ConfigError, match=rf'loss_kd: BoundedIoULoss\(\) compares 4 of {channels} channels'):
        FeatureDiffusion(channels, channels, loss_kd=dict(type='mmdet.BoundedIoULoss'))


@pytest.mark.parametrize('kind', ['FocalLoss', 'CrossEntropyLoss'])
def test_losses_that_are_negative_for_class_scores_are_refused(kind):
    import mmdet.models  # noqa: F401

    with pytest.raises(ConfigError, match=rf'loss_kd: {kind}\(\) is -.* for random features'):
        FeatureDiffusion(16, 16, denoise=False, loss_kd=dict(type=f'mmdet.{kind}'))


def test_a_loss_of_rectified_features_is_accepted():
    """It is not finite if all features are negative, as class scores are."""

    class Rectified(nn.Module):
        def forward(self, student, teacher):
            student, teacher = (feature.relu() / feature.relu().norm() for feature in (student, teacher))
            return (student - teacher).square().sum()

    try_loss(Rectified(), 16, dict(type=Rectified))


def test_the_nearest_of_an_unknown_loss_is_of_mmdiffkd():
    with pytest.raises(ConfigError, match=r"loss_kd\.type='mmdiffkd\.MSELos' .*; the nearest are 'mmdiffkd\.MSELoss'"):
        FeatureDiffusion(8, 8, loss_kd=dict(type='mmdiffkd.MSELos'))
