# The same distillation without denoising: a 1x1 convolution and the mean squared error (FitNet).
_base_ = './diffkd_retinanet-r18-half_retinanet-r18-eighth_6e_shapes.py'
model = dict(distill=dict(fpn=dict(neck=dict(denoise=False))))
