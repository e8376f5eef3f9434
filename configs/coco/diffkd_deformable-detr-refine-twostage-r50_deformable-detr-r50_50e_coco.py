# Deformable DETR R50 with two stages and box refinement -> plain Deformable DETR R50 on COCO, 50 epochs. In mmdet, the
# teacher has 47.0 AP and the student 44.3. The paper does not have this pair.
_base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py', checkpoint='zoo'
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
