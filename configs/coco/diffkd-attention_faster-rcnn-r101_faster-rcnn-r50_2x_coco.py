# Faster R-CNN R101 -> R50 with the attention-weighted distance. In the paper, the distilled student has 40.7 AP.
_base_ = './diffkd_faster-rcnn-r101_faster-rcnn-r50_2x_coco.py'
model = dict(distill=dict(fpn=dict(neck=dict(loss_kd=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)))))
