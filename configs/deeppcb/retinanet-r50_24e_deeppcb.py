# The teacher, trained from scratch. Its anchors have 16 - 128 pixels, because the objects are small.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', '../_base_/deeppcb.py']
model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(num_outs=4),
    bbox_head=dict(num_classes=6, anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32, 64])),
)
