# ResNet-18 on CIFAR-100, which mmpretrain lacks: its ResNet-50 with another depth.
_base_ = 'mmpretrain::resnet/resnet50_8xb16_cifar100.py'
model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
