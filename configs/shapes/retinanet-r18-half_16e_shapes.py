# The demo's teacher: an ordinary mmdet RetinaNet on a ResNet-18 of half the usual width. Training from scratch needs
# normalization layers in neck and head. The objects are small, so there are three levels with anchors from 16 pixels.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/shapes.py']
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    backbone=dict(depth=18, base_channels=32, stem_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=3, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=5,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
)
