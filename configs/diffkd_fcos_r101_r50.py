# FCOS R101 -> R50 on COCO, 2x schedule, multi-scale 640 - 800. The paper: 40.8 -> 38.5, distilled 42.4 AP.
# No regression term. The authors' other distillers start the student's neck and head from the teacher's here:
# --cfg-options model.inherit="['neck', 'bbox_head']"
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_ms-640-800-2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py', checkpoint='zoo'),
    distill=dict(
        fpn=dict(student='neck', teacher='neck', neck=dict(distance=dict(type='mmdiffkd.MSELoss', loss_weight=5.0))),
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
