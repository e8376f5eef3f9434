"""The lines that load pre-trained weights. The runs are in tests/test_apis/test_pretrain.py."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmdiffkd.engine.hooks.pretrained_weights_hook import usage
from tests import tiny


@pytest.fixture
def encoder(tmp_path):
    """Config and weights of a pre-trained backbone and neck."""
    init_default_scope('mmdet')
    model = tiny.detector()
    model.backbone.pop('init_cfg')
    cfg = dict(type='mmdiffkd.ImageEncoder', backbone=model.backbone, neck=model.neck)
    torch.save(dict(state_dict=MODELS.build(cfg).state_dict()), tmp_path / 'pretrained.pth')
    return cfg, tmp_path / 'pretrained.pth'


def test_lines(encoder):
    cfg, file = encoder
    text = usage(file, cfg)
    assert text.endswith(
        'model = dict(\n'
        f"    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{file}', prefix='backbone.')),\n"
        f"    neck=dict(init_cfg=dict(type='Pretrained', checkpoint='{file}', prefix='neck.')),\n"
        ')\n'
    )
    assert 'pretrained=None' in usage(file, dict(cfg, _scope_='mmseg'))


@pytest.mark.parametrize(
    'init_cfg, is_replaced',
    [
        (dict(type='Pretrained', checkpoint='torchvision://resnet18'), False),
        (dict(type='Kaiming', layer='Conv2d'), True),
        ([dict(type='Kaiming', layer='Conv2d')], True),
        (None, True),
    ],
)
def test_earlier_init_cfg_is_replaced_if_it_cannot_be_merged(encoder, init_cfg, is_replaced):
    cfg, file = encoder
    cfg['backbone']['init_cfg'] = init_cfg
    assert ('_delete_=True' in usage(file, cfg)) == is_replaced


def test_necks_of_several_modules_are_loaded_with_the_whole_model(encoder):
    cfg, file = encoder
    text = usage(file, dict(cfg, neck=[cfg['neck']]))
    assert 'the neck is a list of modules' in text and f'load_from = {str(file)!r}' in text


def test_other_weights_are_found(encoder, tmp_path):
    cfg, file = encoder
    weights = torch.load(file)['state_dict']
    weights['backbone.other'] = weights.pop('backbone.conv1.weight')
    torch.save(dict(state_dict=weights), file)
    assert '1 of 120 weights of the backbone are not loaded, such as other' in usage(file, cfg)
