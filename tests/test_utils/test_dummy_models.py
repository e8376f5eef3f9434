from mmengine.config import ConfigDict

from mmdiffkd.utils.dummy_inputs import fit_to, without_pretrained


def test_pretrained_weights_are_removed():
    pretrained = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    cfg = ConfigDict(
        pretrained='open-mmlab://resnet50_v1c',
        backbone=dict(init_cfg=pretrained),
        neck=dict(init_cfg=dict(type='Xavier')),
        heads=[dict(init_cfg=[pretrained])],
    )
    without_pretrained(cfg)
    assert cfg.pretrained is cfg.backbone.init_cfg is cfg.heads[0].init_cfg is None
    assert cfg.neck.init_cfg == dict(type='Xavier')


def test_preprocessors_pad_to_the_new_size():
    cfg = ConfigDict(data_preprocessor=dict(size=(512, 1024), batch_augments=[dict(size=(1024, 1024)), dict(p=1)]))
    assert fit_to(cfg, 64).data_preprocessor == dict(size=(64, 64), batch_augments=[dict(size=(64, 64)), dict(p=1)])
    assert fit_to(ConfigDict(type='X'), 64) == dict(type='X')
