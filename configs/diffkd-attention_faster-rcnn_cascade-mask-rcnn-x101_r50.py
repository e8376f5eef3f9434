# Cascade Mask R-CNN X101 -> Faster R-CNN R50 with the attention-weighted distance. The paper: distilled 42.4 AP.
_base_ = './diffkd_faster-rcnn_cascade-mask-rcnn-x101_r50.py'
model = dict(distill=dict(fpn=dict(neck=dict(loss_kd=dict(type='mmdiffkd.AttentionMSELoss')))))
