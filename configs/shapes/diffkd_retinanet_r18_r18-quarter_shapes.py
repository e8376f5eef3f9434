_base_ = './retinanet_r18-quarter_shapes.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config='configs/shapes/retinanet_r18_shapes.py',
        checkpoint='work_dirs/demo/teacher/epoch_24.pth',
    ),
)
