# ResNet-18 on CIFAR-100. mmpretrain has no such config, so this is its config of ResNet-50 with a different depth.
_base_ = 'mmpretrain::resnet/resnet50_8xb16_cifar100.py'
model = dict(backbone=dict(depth=18), head=dict(in_channels=512))
