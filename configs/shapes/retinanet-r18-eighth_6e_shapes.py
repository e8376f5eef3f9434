# The demo's student: the teacher's detector with a quarter of the backbone channels, and half of the channels in neck
# and head.
_base_ = './retinanet-r18-half_16e_shapes.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32),
)
# a shorter schedule than the teacher's, because the effect of distillation shows early
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
