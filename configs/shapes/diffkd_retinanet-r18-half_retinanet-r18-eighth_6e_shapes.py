_base_ = './retinanet-r18-eighth_6e_shapes.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    preset='plus',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/retinanet-r18-half_16e_shapes.py',
        checkpoint='work_dirs/demo/retinanet-r18-half_16e_shapes/epoch_16.pth',
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
custom_hooks = [dict(type='mmdiffkd.DiffKDVisualizationHook', interval=225)]
