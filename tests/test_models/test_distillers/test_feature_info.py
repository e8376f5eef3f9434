import pytest
import torch

from mmdiffkd.models.distillers import feature_info
from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny


def test_channels_strides_and_calls():
    taps = infer_feature_info(tiny.detector(), ['neck', 'backbone.layer1', 'bbox_head.retina_reg'], 'student')
    assert taps['neck'].channels == [16] * 5
    assert taps['neck'].strides == [8, 16, 32, 64, 128]
    assert taps['backbone.layer1'][:3] == ([8], [4], 1)
    assert taps['bbox_head.retina_reg'][:3] == ([36] * 5, [8, 16, 32, 64, 128], 5)


def test_requires_grad_of_levels():
    """ResNet's first stage is frozen in upstream's detectors."""
    student = tiny.detector(**{'backbone.frozen_stages': 1})
    assert infer_feature_info(student, ['backbone'], 'student')['backbone'].requires_grad == [False, True, True, True]
    assert infer_feature_info(student, ['backbone'], 'teacher')['backbone'].requires_grad is None


def test_random_state_is_unchanged():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    infer_feature_info(tiny.detector(), ['neck'], 'student')
    torch.testing.assert_close(torch.rand(3), expected)


def test_full_size_detector_uses_no_memory(monkeypatch):
    """A full-size ResNet-50 detector runs on the meta device at 512x512."""
    monkeypatch.setattr(feature_info, 'ATTEMPTS', (('meta', 512),))  # no fallback
    cfg = resolve_config(tiny.RETINANET)
    cfg.model.backbone.init_cfg = None
    assert infer_feature_info(get_model_cfg(cfg), ['neck'], 'teacher')['neck'].channels == [256] * 5


def test_taps_after_the_proposals_run_on_the_cpu():
    taps = infer_feature_info(tiny.detector(tiny.FASTER_RCNN), ['neck', 'roi_head.bbox_head.fc_reg'], 'student')
    assert taps['roi_head.bbox_head.fc_reg'][:3] == ([320], [None], 1)
    assert taps['neck'].strides == [4, 8, 16, 32, 64]


@pytest.mark.slow
def test_operators_without_meta_support():
    """Deformable convolutions, as in RepPoints, do not support the meta device."""
    cfg = resolve_config('mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py')
    cfg.model.backbone.init_cfg = None
    assert infer_feature_info(get_model_cfg(cfg), ['neck'], 'teacher')['neck'][:3] == (
        [256] * 5,
        [8, 16, 32, 64, 128],
        1,
    )


def test_forward_that_fails_between_two_levels():
    """RepPoints' head fails on the meta device after its first level; the CPU finds all five."""
    cfg = resolve_config('mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco.py')
    cfg.model.backbone.init_cfg = None
    path = 'bbox_head.reppoints_pts_init_out'
    assert infer_feature_info(get_model_cfg(cfg), [path], 'student')[path][:3] == ([18] * 5, [8, 16, 32, 64, 128], 5)


def test_model_that_fails_on_small_images():
    cfg = resolve_config('mmdet::ssd/ssd300_coco.py')
    cfg.model.backbone.init_cfg = None
    assert infer_feature_info(get_model_cfg(cfg), ['neck'], 'student')['neck'].channels == [
        512,
        1024,
        512,
        256,
        256,
        256,
    ]
