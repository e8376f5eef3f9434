# Faster R-CNN R101 -> R50 on COCO, 2x schedule. AP in the paper: teacher 39.8, student alone 38.4, distilled student
# 40.6. The pair reg compares the box regression of the RoI heads. The teacher's head runs on the student's sampled
# RoIs.
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
