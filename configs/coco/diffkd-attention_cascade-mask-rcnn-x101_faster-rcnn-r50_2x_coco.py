# Cascade Mask R-CNN X101 -> Faster R-CNN R50 with the attention-weighted distance. In the paper, the distilled
# student has 42.4 AP.
_base_ = './diffkd_cascade-mask-rcnn-x101_faster-rcnn-r50_2x_coco.py'
model = dict(distill=dict(fpn=dict(neck=dict(loss_kd=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)))))
