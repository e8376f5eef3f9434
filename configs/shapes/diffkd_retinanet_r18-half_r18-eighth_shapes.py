_base_ = './retinanet_r18-eighth_shapes.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    preset='plus',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/retinanet_r18-half_shapes.py',
        checkpoint='work_dirs/demo/retinanet_r18-half_shapes/epoch_16.pth',
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
custom_hooks = [dict(type='mmdiffkd.DiffKDVisualizationHook', interval=300)]
