# Settings of DiffKD that cost less time or memory.


def diffkd(**neck):
    """Return DiffKD with changes to its neck."""
    return dict(preset='diffkd', distill=dict(fpn=dict(neck=neck)))


every_other = dict(type='mmdiffkd.DistillScheduleHook', interval=2, by_epoch=False)
arms = {
    'diffkd': dict(preset='diffkd'),
    'steps=3': diffkd(scheduler=dict(num_inference_steps=3)),
    'steps=1': diffkd(scheduler=dict(num_inference_steps=1)),
    'num_grad_steps=1': diffkd(num_grad_steps=1),
    'share_levels': diffkd(share_levels=True),
    'latent_channels=32': diffkd(latent_channels=32),
    'latent_channels=16': diffkd(latent_channels=16),
    'interval=2': dict(preset='diffkd', custom_hooks=[every_other]),
}
