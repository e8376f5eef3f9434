import pytest
import torch

from mmdiffkd.models import MLPNoiseAdapter, NoiseAdapter


@pytest.mark.parametrize('kind', [NoiseAdapter, MLPNoiseAdapter])
@pytest.mark.parametrize('size', [(1, 1), (6, 5)])
def test_one_gamma_a_sample_on_maps_of_any_size(kind, size):
    gamma = kind(16)(torch.randn(4, 16, *size))
    assert gamma.shape == (4,)
    assert ((gamma > 0) & (gamma < 1)).all()
