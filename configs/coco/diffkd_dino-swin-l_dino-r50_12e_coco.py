# DINO Swin-L -> R50 on COCO, 12 epochs. In mmdet, the teacher has 57.2 AP and the student 49.0. The paper does not
# have this pair. The default pair compares the outputs of the necks. The teacher has five levels, and the student has
# the four of them with strides 8 - 64. Encoders cannot be tapped, because they return the tokens of all levels in one
# sequence.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
