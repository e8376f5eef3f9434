# Cascade Mask R-CNN ConvNeXt-S -> Mask R-CNN ConvNeXt-T on COCO, 3x schedule, multi-scale and crops.
# In mmdet, the teacher has 51.8 box AP and 44.8 mask AP, and the student 46.2 and 41.7. mmdet trains both with AMP. The
# paper does not have this pair.
_base_ = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
custom_imports = dict(imports=['mmpretrain.models', 'mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::convnext/cascade-mask-rcnn_convnext-s-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py',
        checkpoint='zoo',
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
