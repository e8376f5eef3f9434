"""Upstream models with few channels and layers, and distillers of them."""

from mmengine.config import ConfigDict

from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny

WIDTHS = [8, 16, 24, 32]
DEPTHS = [1, 1, 4, 1]
CONVNEXT = dict(type='mmpretrain.ConvNeXt', arch=dict(depths=DEPTHS, channels=WIDTHS), gap_before_final_norm=False)
# a pair that fits all models
BACKBONES = dict(feat=dict(student='backbone', teacher='backbone'))


def shrunk(config, **changes):
    """Return the config of a model of an installed package, with changes.

    Args:
        config (str): ``pkg::path`` of its config.
        **changes: Model settings to override, with ``__`` for dots.
    """
    cfg = resolve_config(config)
    cfg.merge_from_dict({f'model.{key.replace("__", ".")}': value for key, value in changes.items()})
    return get_model_cfg(cfg)


def convnext_detector():
    """RetinaNet with a ConvNeXt."""
    backbone = dict(CONVNEXT, _delete_=True, out_indices=[0, 1, 2, 3])
    return tiny.detector(**{'backbone': backbone, 'neck.in_channels': WIDTHS})


def convnext_segmentor():
    """UPerNet with a ConvNeXt."""
    return shrunk(
        'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
        backbone__arch=dict(CONVNEXT['arch'], _delete_=True),
        backbone__init_cfg=None,
        decode_head__in_channels=WIDTHS,
        decode_head__channels=16,
        auxiliary_head__in_channels=WIDTHS[2],
        auxiliary_head__channels=16,
    )


def beit_segmentor():
    """UPerNet with a BEiT."""
    return shrunk(
        'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py',
        pretrained=None,
        backbone__img_size=(512, 512),  # BEiT accepts only this size, also in the dry run
        backbone__embed_dims=16,
        backbone__num_layers=4,
        backbone__num_heads=2,
        backbone__out_indices=(0, 1, 2, 3),
        neck__embed_dim=16,
        decode_head__in_channels=[16] * 4,
        decode_head__channels=16,
        auxiliary_head__in_channels=16,
        auxiliary_head__channels=16,
    )


def resnet_classifier(num_classes=3, base_channels=8):
    """A thin ResNet-18."""
    return shrunk(
        'mmpretrain::resnet/resnet18_8xb32_in1k.py',
        backbone__stem_channels=base_channels,
        backbone__base_channels=base_channels,
        head__in_channels=base_channels * 8,
        head__num_classes=num_classes,
        head__topk=(1,),
    )


def convnext_classifier():
    return shrunk(
        'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
        backbone__arch=dict(CONVNEXT['arch'], _delete_=True),
        head__in_channels=WIDTHS[-1],
    )


def swin_classifier():
    return shrunk(
        'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
        backbone__arch=dict(_delete_=True, embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4]),
        head__in_channels=64,
    )


def vit_classifier():
    """Vision Transformer for fine-tuning after MAE."""
    return shrunk(
        'mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py',
        backbone__arch=dict(_delete_=True, embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32),
        backbone__init_cfg=None,
        head__in_channels=16,
    )


def distiller(student, teacher=None, checkpoint='not-needed.pth', **options):
    """Return the config of a distiller. By default, the teacher has the config of the student."""
    teacher = dict(config=teacher or student, checkpoint=str(checkpoint))
    return ConfigDict(type='mmdiffkd.DiffKDDistiller', student=student, teacher=teacher, **options)
