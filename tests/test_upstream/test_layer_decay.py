"""Distillation does not change the layer-wise learning rates and weight decays of the student."""

import pytest
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

from mmdiffkd.engine.checkpoint import PREFIX
from tests import tiny
from tests.conftest import load_tool
from tests.test_upstream import models

LR, DECAY = 0.1, 0.05
CONVNEXT_DEPTH = 6  # upstream's number of layers for a tiny ConvNeXt
LAYER_WISE = dict(decay_rate=0.5, decay_type='layer_wise', num_layers=CONVNEXT_DEPTH)
STAGE_WISE = dict(decay_rate=0.5, decay_type='stage_wise', num_layers=CONVNEXT_DEPTH)
MMPRETRAIN = dict(layer_decay_rate=0.5, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
BY_NAME = dict(custom_keys={'backbone': dict(lr_mult=0.1, decay_mult=0.5), 'backbone.layer4': dict(lr_mult=0.2)})
BY_KIND = dict(norm_decay_mult=0.5, bias_decay_mult=0.0)

# Scope, student, optimizer constructor, settings of the constructor, and the expected (learning rate, weight decay) of
# some parameters.
CASES = dict(
    mmdet_layer_wise=(
        'mmdet',
        models.convnext_detector,
        'LearningRateDecayOptimizerConstructor',
        LAYER_WISE,
        {
            'backbone.downsample_layers.0.0.weight': (LR * 0.5**7, DECAY),
            'backbone.stages.2.3.norm.weight': (LR * 0.5**3, 0),
            'bbox_head.retina_cls.weight': (LR, DECAY),
        },
    ),
    mmdet_stage_wise=(
        'mmdet',
        models.convnext_detector,
        'LearningRateDecayOptimizerConstructor',
        STAGE_WISE,
        {'backbone.stages.0.0.norm.weight': (LR * 0.5**6, 0), 'neck.fpn_convs.0.conv.weight': (LR, DECAY)},
    ),
    mmseg_convnext=(
        'mmseg',
        models.convnext_segmentor,
        'LearningRateDecayOptimizerConstructor',
        STAGE_WISE,
        {'backbone.stages.0.0.norm.weight': (LR * 0.5**6, 0), 'auxiliary_head.conv_seg.weight': (LR, DECAY)},
    ),
    mmseg_beit=(
        'mmseg',
        models.beit_segmentor,
        'LearningRateDecayOptimizerConstructor',
        dict(decay_rate=0.5, decay_type='layer_wise_vit', num_layers=4),
        {'backbone.cls_token': (LR * 0.5**5, DECAY), 'backbone.layers.3.ln1.weight': (LR * 0.5, 0)},
    ),
    mmseg_beit_deprecated_constructor=(
        'mmseg',
        models.beit_segmentor,
        'LayerDecayOptimizerConstructor',
        dict(layer_decay_rate=0.5, num_layers=4),
        {'backbone.patch_embed.projection.weight': (LR * 0.5**5, DECAY)},
    ),
    mmpretrain_convnext=(
        'mmpretrain',
        models.convnext_classifier,
        'LearningRateDecayOptimWrapperConstructor',
        MMPRETRAIN,
        {'backbone.downsample_layers.0.0.weight': (LR * 0.5**7, DECAY), 'head.fc.weight': (LR, DECAY)},
    ),
    mmpretrain_swin=(
        'mmpretrain',
        models.swin_classifier,
        'LearningRateDecayOptimWrapperConstructor',
        MMPRETRAIN,
        {'backbone.patch_embed.projection.weight': (LR * 0.5**6, DECAY), 'backbone.norm3.weight': (LR, 0)},
    ),
    mmpretrain_vit=(
        'mmpretrain',
        models.vit_classifier,
        'LearningRateDecayOptimWrapperConstructor',
        dict(MMPRETRAIN, custom_keys={'.cls_token': dict(decay_mult=0.0), '.pos_embed': dict(decay_mult=0.0)}),
        {'backbone.pos_embed': (LR * 0.5**5, 0), 'backbone.layers.3.attn.qkv.weight': (LR * 0.5, DECAY)},
    ),
    default_by_name=(
        'mmdet',
        tiny.detector,
        'DefaultOptimWrapperConstructor',
        BY_NAME,
        {'backbone.layer1.0.bn1.weight': (LR * 0.1, DECAY * 0.5), 'backbone.layer4.0.conv1.weight': (LR * 0.2, DECAY)},
    ),
    default_by_kind=(
        'mmdet',
        tiny.detector,
        'DefaultOptimWrapperConstructor',
        BY_KIND,
        {'bbox_head.retina_cls.bias': (LR, 0), 'backbone.bn1.bias': (LR, DECAY * 0.5)},
    ),
    default_without_settings=('mmdet', tiny.detector, None, None, {'bbox_head.retina_cls.bias': (LR, DECAY)}),
)


@pytest.mark.parametrize('scope, student, constructor, paramwise_cfg, expected', CASES.values(), ids=CASES.keys())
def test_student_keeps_its_settings(scope, student, constructor, paramwise_cfg, expected):
    DefaultScope.get_instance('layer decay', scope_name=scope)
    optimizer = dict(type='AdamW', lr=LR, weight_decay=DECAY)
    cfg = ConfigDict(optimizer=optimizer, constructor=constructor, paramwise_cfg=paramwise_cfg)
    cfg = ConfigDict({key: value for key, value in cfg.items() if value is not None})
    options = {} if scope == 'mmdet' else dict(distill=models.BACKBONES)
    param_settings = load_tool('analysis_tools/param_groups.py').param_settings  # fails if a parameter occurs twice
    alone = param_settings(MODELS.build(student()), cfg)
    distilled = param_settings(MODELS.build(models.distiller(student(), **options)), cfg)

    assert {name: alone[name] for name in expected} == {
        name: pytest.approx(values) for name, values in expected.items()
    }
    diffusion = {name: distilled.pop(name) for name in list(distilled) if name.startswith(PREFIX)}
    assert distilled == alone
    assert diffusion and {lr for lr, _ in diffusion.values()} == {LR}
    assert {decay for _, decay in diffusion.values()} <= {0, DECAY * 0.5, DECAY}
