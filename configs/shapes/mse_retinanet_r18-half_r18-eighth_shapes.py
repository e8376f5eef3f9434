# The same distillation without denoising: a plain adapter and mean squared error (FitNet).
_base_ = './diffkd_retinanet_r18-half_r18-eighth_shapes.py'
model = dict(distill=dict(fpn=dict(neck=dict(denoise=False))))
