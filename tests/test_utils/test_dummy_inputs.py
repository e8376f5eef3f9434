import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdiffkd.utils import resolve_config
from mmdiffkd.utils.dummy_inputs import num_classes_of, random_batch, random_image, random_items
from tests import tiny


def test_same_seed_same_batch():
    cfg = resolve_config(tiny.RETINANET)
    first, second, other = (random_batch(cfg, 64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.stack(first['inputs']), torch.stack(second['inputs']))
    boxes = [batch['data_samples'][0].gt_instances.bboxes for batch in (first, second, other)]
    assert torch.equal(boxes[0], boxes[1]) and not torch.equal(boxes[0], boxes[2])
    assert (boxes[0][:, 2:] > boxes[0][:, :2]).all() and boxes[0].max() <= 64


@pytest.mark.parametrize(
    'config, has_masks',
    [
        (tiny.RETINANET, False),
        ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', True),
        ('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', False),  # with masks, RTMDet would assign by their centers
        ('mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', True),
    ],
)
def test_masks_only_if_the_pipeline_loads_them(config, has_masks):
    (item, _) = random_items(resolve_config(config), 64)
    assert ('masks' in item['data_samples'].gt_instances) == has_masks


def test_labels_fit_all_heads():
    cfg = resolve_config('mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py')
    assert num_classes_of(cfg.model) == 19
    assert random_batch(cfg, 64)['data_samples'][0].gt_sem_seg.data.max() < 19


@pytest.mark.parametrize(
    'config, shape',
    [
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', (2, 3, 224, 224)),
        ('mmpretrain::lenet/lenet5_mnist.py', (2, 1, 32, 32)),
    ],
)
def test_classifiers_use_their_own_pipeline(config, shape):
    batch = random_batch(resolve_config(config), 256)
    assert torch.stack(list(batch['inputs'])).shape == shape and len(batch['data_samples']) == 2


def test_self_supervised_views():
    batch = random_batch(resolve_config('mmpretrain::simclr/simclr_resnet50_8xb32-coslr-200e_in1k.py'), 256)
    assert [view.shape for view in batch['inputs']] == [(2, 3, 224, 224)] * 2


def test_images_are_not_noise():
    image = random_image(np.random.default_rng(0), 100)
    assert image.shape == (100, 100, 3) and image.dtype == np.uint8
    assert (image[:13, :13] == image[0, 0]).all()


def test_unsupported_packages_are_refused():
    with DefaultScope.overwrite_default_scope('mmengine'):
        with pytest.raises(ValueError, match="need default_scope to be one of mmdet, mmseg, mmpretrain, not 'mmpose'"):
            random_batch(Config(dict(default_scope='mmpose', model=dict(type='X'))), 64)
