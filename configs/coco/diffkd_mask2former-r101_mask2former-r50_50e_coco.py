# Mask2Former R101 -> R50 on COCO, instance segmentation, 50 epochs. In mmdet, the teacher has 44.0 mask AP and the
# student 42.9. The paper does not have this pair. There is no neck; the pixel decoder corresponds to an FPN. Its
# levels 0 - 3 have strides 4, 32, 16 and 8, and 256 channels each.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmdet::mask2former/mask2former_r101_8xb2-lsj-50e_coco.py', checkpoint='zoo'),
    distill=dict(
        pixels=dict(student='panoptic_head.pixel_decoder', teacher='panoptic_head.pixel_decoder'),
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
