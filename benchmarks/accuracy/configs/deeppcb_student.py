# The student has a quarter of the teacher's channels in the backbone, and half of the teacher's channels in neck and
# head. It trains for a quarter as many epochs as the teacher.
_base_ = './deeppcb_teacher.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32),
)
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
