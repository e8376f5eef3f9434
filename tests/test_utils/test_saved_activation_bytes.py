import pytest
import torch

from mmdiffkd.utils import saved_activation_bytes


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_storages_count_once(device):
    x = torch.ones(1000, device=device, requires_grad=True)
    assert saved_activation_bytes(lambda: x * x) == 4000
    assert saved_activation_bytes(lambda: x * x, [x]) == 0
    assert saved_activation_bytes(lambda: x.exp().exp(), [x]) == 8000
