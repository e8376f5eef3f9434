# The teacher: RetinaNet with a ResNet-18 of half the usual width. Training from scratch requires normalization in neck
# and head. The defects are only 14 - 26 pixels wide, so the model has three levels, and its smallest anchors are 16
# pixels wide. The model trains on crops with a quarter of an image's area. Validation and test use whole images.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../../../configs/_base_/deeppcb.py']
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    backbone=dict(depth=18, base_channels=32, stem_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=3, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=6,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
)
train_pipeline = _base_.train_pipeline
train_pipeline.insert(3, dict(type='RandomCrop', crop_size=(160, 160)))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook', interval=1, max_keep_ckpts=1))
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
