# FCOS R101 -> R50 on COCO, 2x schedule, multi-scale 640 - 800.
# AP in the paper: teacher 40.8, student alone 38.5, distilled student 42.4.
# The paper leaves some settings open. They follow the authors' code for other distillation methods on this benchmark:
# there is no pair for the box regression, and neck and head are initialized from the teacher. To turn this
# initialization off, use --cfg-options model.init_from_teacher=None
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_ms-640-800-2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py', checkpoint='zoo'),
    init_from_teacher=['neck', 'bbox_head'],
    distill=dict(fpn=dict(student='neck', teacher='neck')),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
