# There is no autoencoder, because the teacher's feature map has only 256 channels.
_base_ = './resnet18-eighth_12e_shape-classes.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    preset='plus',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/resnet18-half_12e_shape-classes.py',
        checkpoint='work_dirs/resnet18-half_12e_shape-classes/epoch_12.pth',
    ),
    distill=dict(feat=dict(neck=dict(latent_channels=None)), logits=dict()),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
custom_hooks = [dict(type='mmdiffkd.DiffKDVisualizationHook', interval=100)]
