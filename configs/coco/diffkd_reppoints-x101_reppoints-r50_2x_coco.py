# RepPoints X101 -> R50 on COCO, 2x schedule. AP in the paper: teacher 44.2, student alone 38.6, distilled student 41.7.
# The pairs init and refine compare the offsets of both point sets, as in the authors' code for other distillation
# methods.
_base_ = 'mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py', checkpoint='zoo'
    ),
    distill=dict(
        fpn=dict(student='neck', teacher='neck'),
        init=dict(
            student='bbox_head.reppoints_pts_init_out',
            teacher='bbox_head.reppoints_pts_init_out',
            neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.SmoothL1Loss', beta=0.11, loss_weight=0.1)),
        ),
        refine=dict(
            student='bbox_head.reppoints_pts_refine_out',
            teacher='bbox_head.reppoints_pts_refine_out',
            neck=dict(denoise=False, align=False, loss_kd=dict(type='mmdet.SmoothL1Loss', beta=0.11, loss_weight=0.2)),
        ),
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
