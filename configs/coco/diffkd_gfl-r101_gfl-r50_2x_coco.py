# GFL R101 -> R50 on COCO, 2x schedule, multi-scale 480 - 800. In mmdet, the teacher has 44.7 AP and the student 42.9.
# The paper does not have this pair.
_base_ = 'mmdet::gfl/gfl_r50_fpn_ms-2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
