import pytest
import torch

from mmdiffkd.models import MGDNeck
from mmdiffkd.utils.check_config import ConfigError


def losses(neck, student, teacher):
    return neck(student, teacher).losses['loss_kd']


def test_masked_positions_have_no_effect():
    neck, teacher = MGDNeck(4, 8, mask_ratio=1.0), torch.randn(2, 8, 6, 6)
    first, second = (losses(neck, torch.randn(2, 4, 6, 6), teacher) for _ in range(2))
    assert first == second


@pytest.mark.parametrize('mask_channels', [False, True])
def test_mask_ratio(mask_channels):
    torch.manual_seed(0)
    level = MGDNeck(64, 64, mask_ratio=0.65, mask_channels=mask_channels).levels[0]
    mask = level.mask(torch.randn(16, 64, 8, 8))
    assert mask.shape == ((16, 64, 1, 1) if mask_channels else (16, 1, 8, 8))
    assert abs(mask.mean() - 0.35) < 0.05


def test_adapter_only_where_the_channels_differ():
    assert [type(level.align).__name__ for level in MGDNeck([4, 8], [8, 8]).levels] == ['Conv2d', 'Identity']


def test_other_settings_are_refused():
    with pytest.raises(ConfigError, match='mask_ratio=1.5 must be a finite number from 0 to 1'):
        MGDNeck(4, 8, mask_ratio=1.5)
    with pytest.raises(ConfigError, match='num_grad_steps is not an argument of MGDNeck'):
        MGDNeck(4, 8, num_grad_steps=1)
