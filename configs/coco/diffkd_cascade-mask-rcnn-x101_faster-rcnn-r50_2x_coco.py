# Cascade Mask R-CNN X101 -> Faster R-CNN R50 on COCO, 2x schedule.
# AP in the paper: teacher 45.6, student alone 38.4, distilled student 42.2.
# Neck and RPN are initialized from the teacher, as in the authors' code for other distillation methods. The RoI heads
# are not, because they are different. There is no pair for the box regression, because each of the teacher's three
# stages has its own box targets.
_base_ = './diffkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco.py'
model = dict(
    teacher=dict(config='mmdet::cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_20e_coco.py'),
    init_from_teacher=['neck', 'rpn_head'],
    distill=dict(_delete_=True, fpn=_base_.model.distill.fpn),
)
