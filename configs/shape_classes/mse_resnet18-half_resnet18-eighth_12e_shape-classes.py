# The same distillation without denoising: mean squared error of the feature maps (FitNet), KL divergence of the logits.
_base_ = './diffkd_resnet18-half_resnet18-eighth_12e_shape-classes.py'
model = dict(
    distill=dict(feat=dict(neck=dict(denoise=False)), logits=dict(neck=dict(denoise=False, align=False))),
)
