# Cascade Mask R-CNN X101 -> Faster R-CNN R50 on COCO, 2x schedule. The paper: 45.6 -> 38.4, distilled 42.2 AP.
# As in its authors' other distillers the student's neck and RPN start from the teacher's weights; RoI heads differ.
# No regression term: the teacher's three stages have box targets of their own.
_base_ = './diffkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco.py'
model = dict(
    teacher=dict(config='mmdet::cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_20e_coco.py'),
    init_from_teacher=['neck', 'rpn_head'],
    distill=dict(_delete_=True, fpn=_base_.model.distill.fpn),
)
