# RetinaNet R101 -> R50 on COCO, 2x schedule. AP in the paper: teacher 38.9, student alone 37.4, distilled student 39.7.
# The paper leaves some settings open. They follow the authors' code for other distillation methods on this benchmark:
# all FPN levels, one diffusion module per level, L1 distance of the box regression, and a learning rate of 0.02 with
# 1000 iterations of warm-up and clipped gradients.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py', checkpoint='zoo'),
    distill=dict(
        fpn=dict(student='neck', teacher='neck'),
        reg=dict(
            student='bbox_head.retina_reg',
            teacher='bbox_head.retina_reg',
            neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.L1Loss', loss_weight=1.0)),
        ),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.02), clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=1000)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
