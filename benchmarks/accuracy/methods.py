"""What is compared: changes to the plain DiffKD config of a set.

``neck`` is merged into the neck of the default pair, ``hooks`` are added to the run. ``None`` trains the student alone.
"""

METHODS = {
    'alone': None,
    'diffkd': dict(),
    # cheaper recipes
    'steps=3': dict(neck=dict(schedule=dict(num_inference_steps=3))),
    'steps=1': dict(neck=dict(schedule=dict(num_inference_steps=1))),
    'backprop_steps=1': dict(neck=dict(backprop_steps=1)),
    'share_levels': dict(neck=dict(share_levels=True)),
    'latent_channels=32': dict(neck=dict(latent_channels=32)),
    'latent_channels=16': dict(neck=dict(latent_channels=16)),
    'interval=2': dict(hooks=[dict(type='mmdiffkd.DistillScheduleHook', interval=2, by_epoch=False)]),
    # what people would use instead
    'fitnet': dict(neck=dict(denoise=False)),
    'pkd': dict(neck=dict(denoise=False, distance=dict(type='mmdiffkd.PKDLoss', loss_weight=6.0))),
    'cwd': dict(neck=dict(denoise=False, distance=dict(type='mmdiffkd.ChannelWiseDivergence', tau=1.0))),
    'diffkd, attention': dict(neck=dict(distance=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0))),
    'dist': dict(neck=dict(denoise=False, align=False, distance=dict(type='mmdiffkd.DISTLoss'))),
    'cwd of logits': dict(
        neck=dict(
            denoise=False,
            align=False,
            distance=dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=3.0),
        )
    ),
}
GROUPS = {
    'recipes': [
        'alone',
        'diffkd',
        'steps=3',
        'steps=1',
        'backprop_steps=1',
        'share_levels',
        'latent_channels=32',
        'latent_channels=16',
        'interval=2',
    ],
    'detection': ['alone', 'fitnet', 'pkd', 'cwd', 'diffkd', 'diffkd, attention'],
    'segmentation': ['alone', 'dist', 'cwd of logits', 'diffkd'],
}
