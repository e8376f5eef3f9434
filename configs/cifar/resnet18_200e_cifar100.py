# ResNet-18 on CIFAR-100, which mmpretrain does not have: its ResNet-50 config with a different depth.
_base_ = 'mmpretrain::resnet/resnet50_8xb16_cifar100.py'
model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
