_base_ = '../../../configs/camvid/deeplabv3_r18-quarter_camvid.py'
train_cfg = dict(val_interval=_base_.max_iters)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook', by_epoch=False, interval=250, max_keep_ckpts=1))
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
