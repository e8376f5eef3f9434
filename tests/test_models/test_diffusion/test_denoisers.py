import pytest
import torch

from mmdiffkd.models import BottleneckDenoiser, MLPDenoiser


def test_size_matches_the_paper():
    denoiser = BottleneckDenoiser(256)
    assert sum(p.numel() for p in denoiser.layers.parameters()) == 207_872
    assert denoiser.time_embedding.weight.shape == (1000, 256)


@pytest.mark.parametrize('kind', [BottleneckDenoiser, MLPDenoiser])
def test_single_timestep_is_broadcast(kind):
    denoiser = kind(8).eval()
    x = torch.randn(3, 8, 5, 4)
    each = denoiser(x, torch.tensor([7, 7, 7]))
    assert each.shape == x.shape
    torch.testing.assert_close(denoiser(x, torch.tensor([7])), each)
    assert not torch.allclose(denoiser(x, torch.tensor([8])), each)


def test_fewer_channels_than_the_reduction():
    assert BottleneckDenoiser(2)(torch.randn(2, 2, 4, 4), torch.tensor([0])).shape == (2, 2, 4, 4)
