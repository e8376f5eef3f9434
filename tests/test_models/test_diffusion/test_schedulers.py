import pytest
import torch

from mmdiffkd.models import DDIMScheduler


@pytest.mark.parametrize(
    'options, timesteps',
    [
        (dict(), [400, 300, 200, 100, 0]),
        (dict(num_inference_steps=3), [332, 166, 0]),
        (dict(num_inference_steps=1), [0]),
        (dict(start_timestep=500), [500, 375, 250, 125, 0]),
        (dict(start_timestep=500, num_inference_steps=1), [500]),
        (dict(num_train_timesteps=100), [40, 30, 20, 10, 0]),
    ],
)
def test_timesteps(options, timesteps):
    assert DDIMScheduler(**options).timesteps == timesteps


def test_steps_match_the_ddim_formula():
    scheduler = DDIMScheduler(num_inference_steps=3)
    alphas = scheduler.alphas_cumprod
    sample, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    ends = [alphas[166], alphas[0], torch.tensor(1.0)]
    for timestep, after in zip(scheduler.timesteps, ends):
        before = alphas[timestep]
        clean = (sample - (1 - before).sqrt() * noise) / before.sqrt()
        expected = after.sqrt() * clean + (1 - after).sqrt() * noise
        torch.testing.assert_close(scheduler.step(noise, timestep, sample), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('prediction_type', ['epsilon', 'sample', 'v_prediction'])
def test_perfect_predictions_recover_the_clean_feature(prediction_type):
    """``target()`` and ``step()`` use the same prediction type."""
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    sample = scheduler.add_noise(clean, noise, torch.tensor([400, 400]))
    for timestep in scheduler.timesteps:
        torch.testing.assert_close(sample, scheduler.add_noise(clean, noise, torch.tensor([timestep] * 2)))
        sample = scheduler.step(scheduler.target(clean, noise, torch.tensor([timestep] * 2)), timestep, sample)
    torch.testing.assert_close(sample, clean, rtol=1e-4, atol=1e-5)


def test_float32_under_autocast_and_not_in_checkpoints():
    scheduler = DDIMScheduler()
    half = torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert scheduler.step(half, 400, half).dtype == torch.float32
        assert scheduler.add_noise(half, half, torch.tensor([3])).dtype == torch.float32
    assert not scheduler.state_dict()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(num_inference_steps=0), 'num_inference_steps=0'),
        (dict(num_inference_steps=501), 'half of num_train_timesteps=1000'),
        (dict(start_timestep=1000), 'start_timestep=1000'),
        (dict(start_timestep=2), 'start_timestep=2'),
        (dict(prediction_type='noise'), "prediction_type='noise' must be one of 'epsilon', 'sample' or 'v_prediction'"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DDIMScheduler(**options)
