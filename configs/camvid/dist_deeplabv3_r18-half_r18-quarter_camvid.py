# The same distillation without denoising: DIST between the logits.
_base_ = './diffkd_deeplabv3_r18-half_r18-quarter_camvid.py'
model = dict(distill=dict(logits=dict(neck=dict(denoise=False, align=False))))
