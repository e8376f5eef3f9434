# ATSS R101 -> R50 on COCO, 1x schedule. In mmdet, the teacher has 41.5 AP and the student 39.4. The paper does not
# have this pair.
_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::atss/atss_r101_fpn_1x_coco.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
