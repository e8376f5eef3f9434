# Mask R-CNN Swin-S -> Swin-T on COCO, 3x schedule, multi-scale and crops. In mmdet, the teacher has 48.2 box AP and
# 43.2 mask AP, and the student 46.0 and 41.6. The paper does not have this pair. This config trains in float32, as
# mmdet's config without "amp" in its name does.
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
