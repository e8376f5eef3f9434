# Mask R-CNN R101 -> R50 on COCO, 2x schedule. In mmdet, the teacher has 40.8 box AP and 36.6 mask AP, and the student
# 39.2 and 35.4. The paper does not have this pair.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::mask_rcnn/mask-rcnn_r101_fpn_2x_coco.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
