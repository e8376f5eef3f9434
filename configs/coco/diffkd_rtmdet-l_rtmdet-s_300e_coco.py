# RTMDet l -> s on COCO, 300 epochs; 51.3 and 44.5 AP in mmdet, not in the paper.
# The default pair: neck to neck, with RetinaNet's weight. For a new detector, the paper chooses
# fpn.neck.loss_kd.loss_weight so that loss_kd is about as large as Faster R-CNN's.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
