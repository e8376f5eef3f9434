# The demo's teacher: an ordinary mmdet RetinaNet with a ResNet-18, trained from scratch.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/shapes.py',
]
model = dict(
    backbone=dict(depth=18, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64, num_outs=4),
    bbox_head=dict(
        num_classes=5,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=3, strides=[8, 16, 32, 64]),
    ),
)
