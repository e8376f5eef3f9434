"""Pixels with the ignored label are excluded from distillation."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData

from mmdiffkd.models.distillers.diffkd_distiller import find_ignore_index, valid_pixel_mask
from tests import tiny
from tests.test_upstream import models


@pytest.fixture
def segmentor(tmp_path):
    init_default_scope('mmseg')
    student = models.convnext_segmentor()
    logits = dict(loss_kd=dict(type='mmdiffkd.DISTLoss'))
    aux = dict(student='auxiliary_head.conv_seg', teacher='auxiliary_head.conv_seg', neck=logits)
    distill = dict(logits=dict(student='decode_head.conv_seg', teacher='decode_head.conv_seg', neck=logits), aux=aux)
    return tiny.build(tiny.distiller_cfg(tmp_path, student, student, distill=distill))


def samples(labels):
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


def test_ignore_index_and_mask(segmentor):
    assert find_ignore_index(segmentor, 'decode_head.conv_seg') == 255
    assert find_ignore_index(segmentor, 'backbone') is None
    labels = torch.tensor([[[0, 255], [3, 255]]])
    assert valid_pixel_mask(samples(labels), 255).tolist() == [[[[True, False], [True, False]]]]
    assert valid_pixel_mask(samples(labels), None) is None and valid_pixel_mask(None, 255) is None


def compute_losses(model, inputs, labels):
    torch.manual_seed(0)
    return model.loss(inputs, samples(labels))


def test_batch_of_ignored_pixels(segmentor):
    """The losses are 0, not NaN, and all parameters have gradients, because other ranks may have valid pixels."""
    labels = torch.full((2, 64, 64), 255)
    losses = compute_losses(segmentor, torch.randn(2, 3, 64, 64), labels)
    assert losses['diffkd.logits.loss_kd'] == losses['diffkd.aux.loss_kd'] == 0
    total, _ = segmentor.parse_losses(losses)
    total.backward()
    gradients = {name: p.grad for name, p in segmentor.named_parameters() if name.startswith('diffkd.')}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_ignored_pixels_are_excluded(segmentor):
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    inputs = torch.randn(2, 3, 64, 64)
    everywhere = compute_losses(segmentor, inputs, labels)['diffkd.logits.loss_kd']
    labels[:, :32] = 255
    half = compute_losses(segmentor, inputs, labels)['diffkd.logits.loss_kd']
    assert half > 0 and half != everywhere
    labels[labels == 0] = 7  # the labels of valid pixels do not matter
    torch.testing.assert_close(compute_losses(segmentor, inputs, labels)['diffkd.logits.loss_kd'], half)
