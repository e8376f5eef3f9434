# ResNet-34 -> ResNet-18 on ImageNet, 100 epochs. Top-1 in the paper: student alone 69.76, distilled student 72.22, and
# 70.58 with plain MSE. The pairs are the default pairs of classifiers, written out: the feature map before pooling, and
# the logits.
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmpretrain::resnet/resnet34_8xb32_in1k.py', checkpoint='zoo'),
    distill=dict(
        feat=dict(
            student='backbone',
            teacher='backbone',
            neck=dict(latent_channels=1024, loss_kd=dict(type='mmdiffkd.MSELoss')),
        ),
        logits=dict(
            student='head.fc',
            teacher='head.fc',
            neck=dict(
                denoiser=dict(type='mmdiffkd.MLPDenoiser'),
                noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter'),
                loss_kd=dict(type='mmdiffkd.KLDivergence'),
            ),
        ),
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
