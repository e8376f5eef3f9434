import torch
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.models.encoders.image_encoder import unfreeze
from tests import tiny


def encoder(**backbone):
    cfg = tiny.detector(**{f'backbone.{key}': value for key, value in backbone.items()})
    parts = {name: cfg[name] for name in ('backbone', 'neck')}
    return MODELS.build(dict(type='mmdiffkd.ImageEncoder', _scope_='mmdet', **parts))


def test_names_and_outputs_are_those_of_the_whole_model():
    torch.manual_seed(0)
    whole = MODELS.build(tiny.detector()).eval()
    part = encoder().eval()
    expected = {key: value for key, value in whole.state_dict().items() if not key.startswith('bbox_head')}
    assert part.state_dict().keys() == expected.keys()
    part.load_state_dict(expected)
    images = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(part(images), whole.extract_feat(images)):
        assert torch.equal(ours, theirs)


def test_frozen_stages_and_statistics_are_trained():
    part = encoder(frozen_stages=2, norm_eval=True).train()
    assert all(parameter.requires_grad for parameter in part.parameters())
    norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.training for norm in norms)


def test_sync_batch_norm_runs_without_a_process_group():
    part = encoder(norm_cfg=dict(type='SyncBN')).train()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in part.modules())
    assert part.loss(torch.randn(2, 3, 64, 64)) == {}


def test_backbones_that_take_no_setting_of_their_base_class():
    """mmdet's VGG of SSD has no frozen_stages, but mmcv's VGG does."""
    cfg = dict(type='SSDVGG', depth=16, with_last_pool=False, ceil_mode=True, out_indices=(3, 4), _scope_='mmdet')
    assert unfreeze(cfg) == cfg
