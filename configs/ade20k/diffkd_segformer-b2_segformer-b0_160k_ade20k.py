# SegFormer MiT-B2 -> MiT-B0 on ADE20K, 160k iterations. In mmseg, the teacher has 45.58 mIoU and the student 37.41. The
# paper does not have this pair.

# by path: mmengine resolves `mmseg::` only for the original package
_base_ = __import__('mmseg').__path__[0] + '/.mim/configs/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmseg::segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py', checkpoint='zoo'),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
