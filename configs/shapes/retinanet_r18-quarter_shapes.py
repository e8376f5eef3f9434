# The demo's student: the same detector with a quarter of the backbone's channels.
_base_ = './retinanet_r18_shapes.py'
model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128]),
)
