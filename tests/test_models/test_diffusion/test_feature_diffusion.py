import weakref

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.models import FeatureDiffusion, NoiseInputs


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


def test_draws_are_random_or_given():
    student, teacher = features()
    level = FeatureDiffusion(6, 8).eval()
    draws = NoiseInputs(torch.randn(2, 8, 5, 7), torch.randn(2, 8, 5, 7), torch.tensor([3, 900]))
    first, second = level(student, teacher, draws), level(student, teacher, draws)
    torch.testing.assert_close(first.losses, second.losses)
    assert level(student, teacher).losses['loss_kd'] != level(student, teacher).losses['loss_kd']


def test_gamma_one_adds_no_noise():
    student, teacher = features()
    level = FeatureDiffusion(6, 8).eval()
    with torch.no_grad():
        level.noise_adapter.pred.bias.copy_(torch.tensor([100.0, -100.0]))
    refined = [level(student, teacher).denoised for _ in range(2)]
    torch.testing.assert_close(*refined)


def test_without_denoising_it_is_adapter_and_distance():
    student, teacher = features()
    level = FeatureDiffusion(6, 8, denoise=False)
    output = level(student, teacher)
    assert [name for name, _ in level.named_parameters()] == ['align.weight', 'align.bias']
    expected = torch.nn.functional.mse_loss(level.align(student), teacher.detach())
    torch.testing.assert_close(output.losses, dict(loss_kd=expected))
    assert output.gamma is None


def test_without_alignment_features_are_compared_as_they_are():
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


def test_weights_of_the_losses():
    student, teacher = features()
    draws = NoiseInputs(torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7), torch.tensor([3, 900]))
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
    expected, losses = plain(student, teacher, draws).losses, weighted(student, teacher, draws).losses
    for name, factor in dict(loss_diffusion=2.0, loss_reconstruction=3.0, loss_kd=5.0).items():
        torch.testing.assert_close(losses[name], factor * expected[name])


def test_one_pixel_of_one_image():
    """The last image of an epoch may come alone: BatchNorm then has nothing to normalise over."""
    level = FeatureDiffusion(6, 8, latent_channels=4)
    output = level(torch.randn(1, 6, 1, 1), torch.randn(1, 8, 1, 1))
    sum(output.losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in level.parameters())
    assert all(module.training for module in level.modules())


def test_one_pixel_does_not_thaw_what_is_frozen():
    level = FeatureDiffusion(6, 8)
    norms = [module for module in level.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    level(torch.randn(1, 6, 1, 1), torch.randn(1, 8, 1, 1))
    assert not any(norm.training for norm in norms) and level.training


def gradients(level, *inputs):
    """Losses, and the gradients they give to the student and to the weights; the draws are fixed."""
    student, teacher = inputs
    student = student.detach().clone().requires_grad_()
    torch.manual_seed(4)
    losses = level(student, teacher).losses
    sum(losses.values()).backward()
    return losses, student.grad, {name: p.grad for name, p in level.named_parameters()}


@MODELS.register_module()
class PlainDenoiser(nn.Module):
    """A denoiser of a user's own, of plain modules."""

    def __init__(self, channels, num_train_timesteps=1000):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x, timesteps):
        return self.layer(x)


def test_memory_efficient_needs_layers_that_can_be_computed_again():
    options = dict(denoiser=dict(type='PlainDenoiser'))
    assert FeatureDiffusion(6, 8, **options)(*features()).losses['loss_kd'] > 0
    with pytest.raises(ValueError, match='memory_efficient=True has no effect on the denoiser PlainDenoiser'):
        FeatureDiffusion(6, 8, memory_efficient=True, **options)


@pytest.mark.parametrize('prediction_type', ['sample', 'v_prediction'])
def test_prediction_types_train_all_parts(prediction_type):
    level = FeatureDiffusion(6, 8, scheduler=dict(prediction_type=prediction_type))
    sum(level(*features()).losses.values()).backward()
    assert all(p.grad is not None for p in level.parameters())


def test_memory_efficient_changes_nothing():
    inputs, results = features(), []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        level = FeatureDiffusion(6, 8, latent_channels=4, memory_efficient=memory_efficient)
        results.append((*gradients(level, *inputs), dict(level.named_buffers())))
    torch.testing.assert_close(*results)


def test_samples_are_kept_where_they_are_asked_for():
    """The backward pass does not need them: without being asked for, they are gone after the forward pass."""
    student, teacher = features()
    level = FeatureDiffusion(6, 8)
    noised = []
    level.denoiser.register_forward_pre_hook(lambda module, args: noised.append(args[0]))
    output = level(student, teacher, return_trajectory=True)
    assert len(output.trajectory) == 6
    for sample, seen in zip(output.trajectory, noised[:5]):  # its sixth pass is that of the teacher
        torch.testing.assert_close(sample, seen)

    alive = []
    level = FeatureDiffusion(6, 8, memory_efficient=True)
    step = level.scheduler.step

    def note(*args):
        sample = step(*args)
        alive.append(weakref.ref(sample))
        return sample

    level.scheduler.step = note
    output = level(student, teacher)
    assert not output.trajectory and len(alive) == 5 and not any(sample() is not None for sample in alive[:-1])


def test_gradient_through_the_last_steps_only():
    """Of earlier steps only their part past the denoiser is left: the student still learns, scaled by the schedule."""
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
    """Steps without a gradient leave no weights behind in autocast's cache that others would take."""
    student, teacher = features()
    level = FeatureDiffusion(6, 8, num_grad_steps=1)
    for module in level.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: None)  # as with SyncBatchNorm, chains run plainly
    with torch.autocast('cpu', torch.bfloat16):
        losses = level(student, teacher).losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in level.parameters())


@pytest.mark.parametrize('denoise', [True, False])
def test_a_distance_may_ask_for_a_view(denoise):
    class Flat(nn.Module):
        def forward(self, student, teacher):
            return (student.view(2, 8, 35) - teacher.view(2, 8, 35)).abs().mean()

    student, teacher = features()
    level = FeatureDiffusion(6, 8, denoise=denoise)
    level.loss_kd = Flat()
    assert level(student, teacher).losses['loss_kd'] > 0


def test_gradient_past_the_denoiser_is_that_of_the_schedule():
    """With a denoiser that predicts the same for all, nothing but the scales of the steps is left."""
    student, teacher = features()
    levels = []
    for steps in (1, 5):
        torch.manual_seed(0)
        levels.append(FeatureDiffusion(6, 8, num_grad_steps=steps))
        nn.init.zeros_(levels[-1].denoiser.layers[-1].weight)
    ours, theirs = (gradients(level, student, teacher)[1] for level in levels)
    torch.testing.assert_close(ours, theirs)


def test_different_batches():
    with pytest.raises(ValueError, match=r'\(1, 6, 5, 7\) and teacher \(2, 8, 5, 7\) must have the same batch size'):
        FeatureDiffusion(6, 8)(torch.randn(1, 6, 5, 7), torch.randn(2, 8, 5, 7))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(denoise=False, latent_channels=4), 'latent_channels=4 has no effect'),
        (dict(align=False), 'align=False needs denoise=False'),
        (dict(denoise=False, num_grad_steps=1), 'num_grad_steps=1 has no effect with denoise=False'),
        (dict(denoise=False, memory_efficient=True), 'memory_efficient=True has no effect with denoise=False'),
        (dict(num_grad_steps=0), 'num_grad_steps=0 must be between 1 and scheduler.num_inference_steps=5'),
        (dict(num_grad_steps=6), 'num_grad_steps=6 must be between 1 and'),
        (dict(denoise=False, align=False), 'the student has 6 channels and the teacher 8'),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureDiffusion(6, 8, **options)


def test_classes_must_agree_where_classes_are_compared():
    for distance in ('KLDivergence', 'DISTLoss'):
        with pytest.raises(ValueError, match='class by class, but the student has 19 classes and the teacher 150; tap'):
            FeatureDiffusion(19, 150, loss_kd=dict(type=f'mmdiffkd.{distance}'))


def test_one_channel_is_no_distribution():
    with pytest.raises(ValueError, match='compares distributions over classes, but there is only one channel'):
        FeatureDiffusion(1, 1, loss_kd=dict(type='mmdiffkd.DISTLoss'))


def test_pooled_features_meet_pooled_features():
    """A vector is no pixel in the middle of a map."""
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
    draws = NoiseInputs(torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6), torch.tensor([3, 900]))
    output = level(student, teacher, draws, mask)
    expected = level.loss_kd(output.denoised[..., :3], output.teacher_latent[..., :3])
    torch.testing.assert_close(output.losses['loss_kd'], expected)
    plain = FeatureDiffusion(4, 4, denoise=denoise).eval()  # distances of features take none
    torch.testing.assert_close(plain(student, teacher, draws, mask).losses, plain(student, teacher, draws).losses)
