# The student. The schedule is short, because the effect of distillation shows early.
_base_ = '../../../configs/camvid/deeplabv3-r18-quarter_camvid.py'
max_iters = 1000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_iters)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook', by_epoch=False, interval=250, max_keep_ckpts=1))
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
