"""Boxes and labels read from mmdet's heads, compared with what the heads compute themselves."""

import pytest
import torch
from mmengine.registry import MODELS

from mmdiffkd.models.distillers.recorders import ModuleOutputsRecorder
from mmdiffkd.models.necks.dense_heads import (
    assign_labels,
    decode_boxes,
    find_dense_head,
    find_output_layer,
    giou,
    regression_rows,
)
from tests import tiny
from tests.test_models.test_presets.test_head_presets import DENSE, detector


def build(name):
    torch.manual_seed(0)
    model = MODELS.build(detector(name))
    model.init_weights()
    return model


@pytest.mark.parametrize('name', DENSE)
def test_boxes_are_those_of_the_head(name):
    head = build(name).eval().bbox_head
    layers = [f'bbox_head.{find_output_layer(head, branch)}' for branch in ('cls', 'reg')]
    features = [torch.randn(2, 16, side, side) for side in (8, 4, 2, 1, 1)]
    wrapper = torch.nn.ModuleDict(dict(bbox_head=head))
    with torch.no_grad(), ModuleOutputsRecorder(wrapper, layers, 'student') as recorder:
        outputs = head(features)
    raw = recorder.features(layers[1], (64, 64))
    all_priors = head.prior_generator.grid_priors([x.shape[-2:] for x in features], device='cpu')
    for level, (final, priors, (stride, _)) in enumerate(zip(outputs[1], all_priors, head.prior_generator.strides)):
        found = decode_boxes(head, level, regression_rows(head, level, raw[level]), priors) * stride
        flat = final.permute(0, 2, 3, 1).reshape(2, -1, 68 if name == 'GFL' else 4)
        for image, boxes in zip(flat, found.view(2, -1, 4)):
            if name == 'GFL':
                centers = head.anchor_center(priors)
                expected = head.bbox_coder.decode(centers, head.integral(image) * stride)
            else:
                expected = head.bbox_coder.decode(priors, image)
            torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', DENSE)
def test_labels_are_those_of_the_head(name, monkeypatch):
    model = build(name).train()
    head = model.bbox_head
    inputs, samples = tiny.batch(model)
    samples[0].gt_instances = samples[0].gt_instances[:0]
    seen = []
    own = head.get_targets
    monkeypatch.setattr(head, 'get_targets', lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[-1])
    features = model.extract_feat(inputs)
    head.loss(features, samples)
    positives, weights, count = assign_labels(head, head(features)[0], samples)
    expected, found = seen
    labels = expected[1] if name in ('GFL', 'ATSS') else expected[0]
    for ours, theirs, weight in zip(positives, labels, weights):
        assert ours.shape == weight.shape == theirs.flatten().shape
        assert torch.equal(ours, (theirs.flatten() >= 0) & (theirs.flatten() < head.num_classes))
    per_image = torch.cat([level.view(2, -1) for level in positives], dim=1).sum(dim=1)
    assert per_image[0] == 0 < per_image[1] and count == 1 + per_image[1]
    if not name.startswith('FCOS'):
        assert count == expected[-1]  # the head's own divisor
    if name == 'RetinaNet':
        assert min(weight.min() for weight in weights) == 0  # anchors between the two thresholds


@pytest.mark.parametrize('name', DENSE)
def test_heads_are_found_on_the_meta_device(name):
    with torch.device('meta'):
        assert find_dense_head(MODELS.build(detector(name))) is not None


@pytest.mark.parametrize(
    'config',
    ['mmdet::tood/tood_r50_fpn_1x_coco.py', 'mmdet::ssd/ssd300_coco.py', 'mmdet::vfnet/vfnet_r50_fpn_1x_coco.py'],
)
def test_other_heads_are_not_supported(config):
    from mmdiffkd.utils import build_for_inspection, get_model_cfg, resolve_config

    assert find_dense_head(build_for_inspection(get_model_cfg(resolve_config(config)))) is None


def test_giou():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 6.0, 6.0]], requires_grad=True)
    other = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [7.0, 5.0, 8.0, 6.0]])
    values = giou(boxes, other)
    values.sum().backward()
    torch.testing.assert_close(values, torch.tensor([1.0, 0.0, -1 / 3]))
    assert boxes.grad.isfinite().all()
