_base_ = './retinanet-r18_24e_deeppcb.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/retinanet-r50_24e_deeppcb.py',
        checkpoint='work_dirs/retinanet-r50_24e_deeppcb/epoch_24.pth',
    ),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
