# The same distillation without denoising: the DIST loss compares the logits directly.
_base_ = './diffkd_deeplabv3-r18-half_deeplabv3-r18-quarter_1500i_camvid.py'
model = dict(distill=dict(logits=dict(neck=dict(denoise=False, align=False))))
