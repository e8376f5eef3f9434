# ResNet-50 -> ResNet-18 on CIFAR-10. In mmpretrain's model zoo, the teacher has 95.55 top-1 and the student 94.82. The
# paper does not have this pair. There is no autoencoder, as in the paper's experiments on CIFAR.
_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmpretrain::resnet/resnet50_8xb16_cifar10.py', checkpoint='zoo'),
    distill=dict(feat=dict(neck=dict(latent_channels=None)), logits=dict()),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
