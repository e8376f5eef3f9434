# Swin-L -> Swin-T on ImageNet. In the paper, the distilled student has 82.5 top-1. In mmpretrain's model zoo, the
# student alone has 81.18, and the teacher, which was pretrained on ImageNet-21k, has 86.24. The recipe is
# mmpretrain's. The teacher also receives the mixed images of this recipe.
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(config='mmpretrain::swin_transformer/swin-large_16xb64_in1k.py', checkpoint='zoo'),
    distill=dict(feat=dict(neck=dict(latent_channels=768)), logits=dict()),
)
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
