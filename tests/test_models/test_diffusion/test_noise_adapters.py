import pytest
import torch

from mmdiffkd.models import FeatureDiffusion, FixedGamma, MLPNoiseAdapter, NoiseAdapter, NoiseInputs


@pytest.mark.parametrize('kind', [NoiseAdapter, MLPNoiseAdapter])
@pytest.mark.parametrize('size', [(1, 1), (6, 5)])
def test_one_gamma_per_sample_for_any_size(kind, size):
    gamma = kind(16)(torch.randn(4, 16, *size))
    assert gamma.shape == (4,)
    assert ((gamma > 0) & (gamma < 1)).all()


def test_fixed_gamma_of_one_adds_no_noise():
    torch.manual_seed(0)
    level = FeatureDiffusion(8, 8, noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=1.0))
    student = torch.randn(4, 8, 6, 5, requires_grad=True)
    output = level(student, torch.randn(4, 8, 6, 5), return_trajectory=True)
    assert output.gamma.tolist() == [1] * 4
    torch.testing.assert_close(output.trajectory[0], output.student_latent)
    assert not list(level.noise_adapter.parameters())
    output.losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0


def test_fixed_gamma_is_the_share_of_the_student():
    torch.manual_seed(0)
    level = FeatureDiffusion(8, 8, noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=0.25))
    noise = torch.randn(4, 8, 6, 5)
    output = level(
        torch.randn(4, 8, 6, 5), torch.randn(4, 8, 6, 5), NoiseInputs(adapter_noise=noise), return_trajectory=True
    )
    torch.testing.assert_close(output.trajectory[0], 0.25 * output.student_latent + 0.75 * noise)
    with pytest.raises(ValueError, match='gamma=1.5 must be a finite number from 0 to 1'):
        FixedGamma(1.5)
