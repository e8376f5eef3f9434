import pytest
from mmengine.config import Config

from mmdiffkd.utils import resolve_config
from mmdiffkd.utils.image_settings import image_size
from tests.conftest import ROOT


def detection(*steps, **others):
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet', data_preprocessor=dict(pad_size_divisor=32)),
            train_dataloader=dict(dataset=dict(pipeline=[*steps, dict(type='PackDetInputs')])),
            **others,
        )
    )


@pytest.mark.parametrize(
    'step, size',
    [
        (dict(type='Resize', scale=(1333, 800), keep_ratio=True), (800, 1344)),
        (dict(type='Resize', scale=(640, 320)), (320, 640)),
        (dict(type='RandomChoiceResize', scales=[(640, 1333), (800, 1333)], keep_ratio=True), (800, 1344)),
        (dict(type='RandomResize', scale=[(320, 320), (608, 608)], keep_ratio=True), (608, 608)),
        (dict(type='RandomCrop', crop_size=(512, 256)), (256, 512)),
        (dict(type='RandomCrop', crop_type='relative_range', crop_size=(0.5, 0.5)), (800, 1344)),
        (dict(type='Resize', scale_factor=1.0), (800, 1344)),
        (dict(type='Mosaic', img_scale=(640, 320)), (320, 640)),
        (dict(type='RandomChoice', transforms=[[dict(type='Resize', scale=(96, 64))], []]), (64, 96)),
    ],
)
def test_size_after_the_training_pipeline(step, size):
    assert image_size(detection(step)) == size


def test_last_transform_determines_the_size():
    steps = dict(type='RandomResize', scale=(1280, 1280)), dict(type='RandomCrop', crop_size=(640, 640))
    assert image_size(detection(*steps)) == (640, 640)
    mixed = detection(*steps)
    mixed.train_dataloader.dataset = dict(
        type='MultiImageMixDataset', pipeline=[dict(type='Resize', scale=(320, 320))], dataset=dict(pipeline=steps)
    )
    assert image_size(mixed) == (320, 320)
    assert image_size(detection(*steps, image_size=(96, 64))) == (64, 96)


@pytest.mark.parametrize(
    'config, size',
    [
        ('shapes/diffkd_retinanet-r18-half_retinanet-r18-eighth_6e_shapes.py', (128, 128)),
        ('camvid/diffkd_deeplabv3-r18-half_deeplabv3-r18-quarter_1500i_camvid.py', (160, 160)),
        ('shape_classes/diffkd_resnet18-half_resnet18-eighth_12e_shape-classes.py', (64, 64)),
        ('cityscapes/diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes.py', (512, 1024)),
        ('cifar/diffkd_resnet50_resnet18_200e_cifar100.py', (32, 32)),
        ('imagenet/diffkd_swin-l_swin-t_300e_in1k.py', (224, 224)),
        ('coco/diffkd_yolox-l_yolox-s_300e_coco.py', (640, 640)),
    ],
)
def test_shipped_configs(config, size):
    assert image_size(Config.fromfile(ROOT / 'configs' / config)) == size


def test_default_sizes():
    assert image_size(resolve_config(dict(type='X'))) == (224, 224)
    assert image_size(Config(dict(default_scope='mmseg', model=dict(type='X')))) == (512, 1024)
