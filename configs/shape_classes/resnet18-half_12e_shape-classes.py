# The teacher: an ordinary mmpretrain ResNet-18 of half the usual width, whose last feature map has 4x4 pixels.
_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/shape_classes.py']
model = dict(
    backbone=dict(base_channels=32, stem_channels=32, strides=(1, 2, 2, 1), zero_init_residual=False),
    head=dict(num_classes=5, in_channels=256, topk=(1,)),
)
