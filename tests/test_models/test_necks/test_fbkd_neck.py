import pytest
import torch

from mmdiffkd.models import FBKDNeck
from mmdiffkd.models.necks import DistillContext
from mmdiffkd.utils.check_config import ConfigError


def test_levels_of_any_size():
    """Levels smaller than the pooling, of a single pixel, and of other channels and sizes than the teacher's."""
    neck = FBKDNeck([4, 4, 4, 4, 4], [8, 8, 8, 8, 8])
    student = [torch.randn(1, 4, size, size + 1, requires_grad=True) for size in (9, 5, 3, 2)]
    student.append(torch.randn(1, 4, 1, 1, requires_grad=True))
    teacher = [torch.randn(1, 8, size, size) for size in (18, 5, 3, 2, 1)]
    outputs = neck(student, teacher, DistillContext())
    assert [level.student_non_local.stride for level in neck.levels] == [8, 4, 2, 2, 2]
    assert list(outputs[0].losses) == ['loss_attention', 'loss_channel', 'loss_spatial', 'loss_non_local']
    sum(loss for output in outputs for loss in output.losses.values()).backward()
    assert all(feature.grad.isfinite().all() and feature.grad.any() for feature in student)


def test_loss_weight_scales_all_terms():
    torch.manual_seed(0)
    neck, features = FBKDNeck([4], [4]), (torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6))
    (before,) = neck(features[:1], features[1:], DistillContext())
    neck.loss_weight = 3.0
    (after,) = neck(features[:1], features[1:], DistillContext())
    for name, loss in before.losses.items():
        torch.testing.assert_close(after.losses[name], 3 * loss)


def test_refuses_wrong_settings():
    with pytest.raises(ConfigError, match='reduction=0 must be'):
        FBKDNeck([4], [4], reduction=0)
    with pytest.raises(ValueError, match='one student tap with one teacher tap'):
        FBKDNeck([[4], [4]], [[4], [4]])
