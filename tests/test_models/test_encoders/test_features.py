"""The features of a library's model are those of the library, on images that are normalized as it does."""

import pytest
import torch
from mmengine.registry import MODELS

from mmdiffkd.models.distillers.feature_info import infer_feature_info
from mmdiffkd.models.distillers.teacher import Teacher
from tests.test_models.test_encoders.encoders import timm_teacher, torchvision_teacher, transformers_teacher

RAW = dict(bgr_to_rgb=True, mean=[0.0] * 3, std=[1.0] * 3)  # a student that takes RGB values from 0 to 255


def build(cfg, taps=('backbone',), **options):
    teacher = Teacher(**cfg, **options)
    teacher.expect(RAW, infer_feature_info(teacher.model_cfg, taps, 'teacher'))
    return teacher


def images_of(*size):
    return torch.randint(0, 256, (2, 3, *size)).float()


def normalized(images, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - mean) / std


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_vit_of_timm(tmp_path):
    """The class token is dropped, and the final norm is applied."""
    cfg, model = timm_teacher(tmp_path)
    teacher = build(cfg)
    images = images_of(160, 160)
    tokens = model.forward_features(normalized(images, **_stats(model)))
    expected = tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (10, 10))
    (found,) = teacher.features(images)['backbone']
    assert_equal(found, expected)
    assert teacher.taps['backbone'].strides == [16] and teacher.taps['backbone'].channels == [found.size(1)]


def _stats(model):
    return dict(mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'])


@torch.no_grad()
def test_stages_of_timm(tmp_path):
    cfg, model = timm_teacher(tmp_path, 'test_resnet')
    teacher = build(cfg)
    images = images_of(100, 90)
    found = teacher.features(images)['backbone']
    assert teacher.taps['backbone'].strides == [4, 8, 16, 32]
    assert_equal(found[-1], model.forward_features(normalized(images, **_stats(model))))


@torch.no_grad()
def test_torchvision(tmp_path):
    cfg, model = torchvision_teacher(tmp_path)
    teacher = build(cfg)
    images = images_of(96, 128)
    stages = {}
    for name in ('maxpool', 'stage2', 'stage3', 'conv5'):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: stages.update({name: out}))
    model(normalized(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert_equal(teacher.features(images)['backbone'], list(stages.values()))


@torch.no_grad()
def test_swin_of_torchvision_returns_channels_first():
    from mmdiffkd.utils import resolve_config
    from mmdiffkd.utils.config import get_teacher_cfg
    from mmdiffkd.utils.meta_device import build_on_meta

    model = build_on_meta(get_teacher_cfg(resolve_config('torchvision::swin_t')))
    shapes = [tuple(level.shape[1:]) for level in model(torch.zeros(1, 3, 64, 96, device='meta'))]
    assert shapes == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    # as many channels as columns
    shapes = [tuple(level.stride()[1:]) for level in model(torch.zeros(1, 3, 384, 384, device='meta'))]
    assert shapes[0] == (1, 96 * 96, 96)


@torch.no_grad()
@pytest.mark.parametrize('kind, options', [('Dinov2', {}), ('ViT', dict(patch_size=16, image_size=64))])
def test_transformers(tmp_path, kind, options):
    """DINOv2 has a backbone class; of ViT, the hidden states are taken."""
    cfg, model = transformers_teacher(tmp_path, kind, **options)
    teacher = build(cfg)
    side = options.get('image_size', 56)
    images = images_of(side, side)
    tokens = model(normalized(images, [0.5, 0.4, 0.3], [0.2, 0.2, 0.1])).last_hidden_state[:, 1:]
    (found,) = teacher.features(images)['backbone']
    assert_equal(found, tokens.transpose(1, 2).unflatten(2, (4, 4)))


def test_image_encoder_of_clip(tmp_path):
    vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=16)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    cfg, model = transformers_teacher(tmp_path, 'CLIP', vision_config=dict(vision, image_size=32), text_config=text)
    teacher = build(cfg)
    weights = teacher.model.backbone.model.state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    assert teacher.features(images_of(64, 96))['backbone'][0].shape == (2, 32, 4, 6)


@pytest.mark.parametrize('out_indices, count', [([0, -1], 2), ([1], 1)])
def test_chosen_maps(tmp_path, out_indices, count):
    cfg, _ = timm_teacher(tmp_path)
    config = dict(type='mmdiffkd.TimmEncoder', name='test_vit', out_indices=out_indices)
    teacher = build(dict(cfg, config=config))
    assert len(teacher.features(images_of(32, 32))['backbone']) == count


def test_inner_modules_are_taps(tmp_path):
    cfg, _ = timm_teacher(tmp_path)
    teacher = build(cfg, ['backbone.model.blocks.0'])
    assert teacher.features(images_of(64, 96))['backbone.model.blocks.0'][0].shape[-2:] == (4, 6)


def test_a_module_of_the_user_has_default_taps(tmp_path):
    model_cfg = dict(type='mmdiffkd.EncoderTeacher', backbone=dict(type='Conv2d', in_channels=3, out_channels=4))
    config = dict(model=dict(model_cfg), data_preprocessor=dict(mean=[1.0] * 3, std=[1.0] * 3))
    config['model']['backbone'].update(kernel_size=8, stride=8)
    conv = MODELS.build(dict(config['model']['backbone']))
    torch.save(conv.state_dict(), tmp_path / 'conv.pth')
    teacher = build(dict(config=config, checkpoint=str(tmp_path / 'conv.pth')))
    images = images_of(64, 64)
    with torch.no_grad():
        assert_equal(teacher.features(images)['backbone'], [conv(images.flip(1) - 1)])


def test_size_of_images_that_a_config_sets():
    from mmdiffkd.utils import resolve_config

    for img_size, size in ((96, (96, 96)), ([64, 96], (96, 64))):
        cfg = resolve_config(dict(type='mmdiffkd.TorchvisionEncoder', name='resnet18', img_size=img_size))
        assert tuple(cfg.image_size) == size
