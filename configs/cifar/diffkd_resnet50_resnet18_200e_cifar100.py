# ResNet-50 -> ResNet-18 on CIFAR-100. In mmpretrain's model zoo, the teacher has 79.90 top-1. The paper does not have
# this pair. There is no autoencoder, as in the paper's experiments on CIFAR.
_base_ = './resnet18_200e_cifar100.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmpretrain::resnet/resnet50_8xb16_cifar100.py', checkpoint='zoo'),
    distill=dict(feat=dict(neck=dict(latent_channels=None)), logits=dict()),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
