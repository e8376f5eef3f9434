# The demo's student: the same detector with a quarter of the teacher's backbone and half of its neck and head.
_base_ = './retinanet_r18-half_shapes.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32),
)
