_base_ = './deeplabv3-r18-quarter_camvid.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/deeplabv3-r18-half_camvid.py',
        checkpoint='work_dirs/deeplabv3-r18-half_camvid/iter_1500.pth',
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
custom_hooks = [dict(type='mmdiffkd.DiffKDVisualizationHook', interval=300)]
