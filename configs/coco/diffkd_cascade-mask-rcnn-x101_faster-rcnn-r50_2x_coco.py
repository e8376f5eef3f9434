# Cascade Mask R-CNN X101 -> Faster R-CNN R50 on COCO, 2x schedule. The paper: 45.6 -> 38.4, distilled 42.2 AP.
# As in the authors' other distillers, neck and RPN are initialized from the teacher; the RoI heads are different.
# No regression term: each of the teacher's three stages has its own box targets.
_base_ = './diffkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco.py'
model = dict(
    teacher=dict(config='mmdet::cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_20e_coco.py'),
    init_from_teacher=['neck', 'rpn_head'],
    distill=dict(_delete_=True, fpn=_base_.model.distill.fpn),
)
