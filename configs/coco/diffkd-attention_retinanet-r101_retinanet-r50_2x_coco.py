# RetinaNet R101 -> R50 with the attention-weighted distance. In the paper, the distilled student has 39.8 AP.
_base_ = './diffkd_retinanet-r101_retinanet-r50_2x_coco.py'
model = dict(distill=dict(fpn=dict(neck=dict(loss_kd=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)))))
