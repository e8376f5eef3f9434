# Faster R-CNN R101 -> R50 on COCO, 2x schedule. The paper: 39.8 -> 38.4, distilled 40.6 AP.
# The box regression of the teacher's RoI head is compared on the RoIs that the student samples.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py', checkpoint='zoo'),
    distill=dict(
        fpn=dict(student='neck', teacher='neck'),
        reg=dict(
            student='roi_head.bbox_head.fc_reg',
            teacher='roi_head.bbox_head.fc_reg',
            neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.SmoothL1Loss', loss_weight=1.0)),
        ),
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
