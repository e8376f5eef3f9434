"""What is compared: changes to the plain DiffKD config of a set.

``neck`` is merged into the neck of the set's pair, ``levels`` are those of the pair, ``pairs`` are added to it,
``distill`` stands in its place, ``preset`` is the distiller's, ``hooks`` are added to the run, ``lr_mult`` multiplies
the learning rate of the diffusion part. ``None`` trains the student alone.
"""

import copy
from typing import Optional

import benchmarks.accuracy.variants  # noqa: F401  registers them


def schedule(**kwargs) -> dict:
    return dict(neck=dict(schedule=kwargs))


def plain(distance: str, loss_weight: float = 1.0, align: bool = True, **kwargs) -> dict:
    """A distance without denoising."""
    distance = dict(type=f'mmdiffkd.{distance}', loss_weight=loss_weight, **kwargs)
    return dict(neck=dict(denoise=False, align=align, distance=distance))


def scheduled(**kwargs) -> dict:
    return dict(hooks=[dict(type='mmdiffkd.DistillScheduleHook', **kwargs)])


def variant(lr_mult: float = 1.0, **kwargs) -> dict:
    return dict(neck=dict(type='mmdiffkd.VariantNeck', **kwargs), lr_mult=lr_mult)


def of_features(loss_weight: float, distance: str = 'MSELoss', denoise: bool = True) -> dict:
    """A segmentor's last feature map in place of its logits."""
    neck = dict(denoise=denoise, distance=dict(type=f'mmdiffkd.{distance}', loss_weight=loss_weight))
    return dict(distill=dict(feat=dict(student='backbone', teacher='backbone', levels=[3], neck=neck)))


def of_head(name: str, **distance) -> dict:
    """What a layer of both heads says, compared as it is."""
    path = f'bbox_head.{name}'
    return dict(student=path, teacher=path, neck=dict(denoise=False, align=False, distance=distance))


HEAD = dict(
    cls=of_head('retina_cls', type='mmdiffkd.ChannelWiseDivergence'),
    reg=of_head('retina_reg', type='mmdet.L1Loss'),
)


METHODS = {
    'alone': None,
    'diffkd': dict(),
    'plus': dict(preset='plus', distill=None),
    # its parts, and cheaper recipes
    'steps=3': schedule(num_inference_steps=3),
    'steps=1': schedule(num_inference_steps=1),
    'start_timestep=500': schedule(start_timestep=500),
    'gamma=1': dict(neck=dict(noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=1.0))),
    'gamma=0.9': dict(neck=dict(noise_adapter=dict(type='mmdiffkd.FixedGamma', gamma=0.9))),
    'loss_diffusion_weight=0': dict(neck=dict(loss_diffusion_weight=0.0)),
    'levels=[0]': dict(levels=[0]),
    'levels=[0, 1]': dict(levels=[0, 1]),
    'backprop_steps=1': dict(neck=dict(backprop_steps=1)),
    'share_levels': dict(neck=dict(share_levels=True)),
    'latent_channels=32': dict(neck=dict(latent_channels=32)),
    'latent_channels=16': dict(neck=dict(latent_channels=16)),
    'interval=2': scheduled(interval=2, by_epoch=False),
    # with other distances
    'diffkd, attention': dict(neck=dict(distance=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0))),
    'diffkd, cwd': dict(neck=dict(distance=dict(type='mmdiffkd.ChannelWiseDivergence'))),
    # the method changed
    'without proj': variant(proj=False),
    'normalised features': variant(normalise=True),
    'GroupNorm': variant(group_norm=True),
    'smooth time, zero init': variant(smooth_time=True, zero_init=True),
    'learning rate x10': dict(lr_mult=10.0),
    'no denoiser gradient': variant(detach=True),
    'x0 prediction': variant(prediction='clean'),
    'v prediction': variant(prediction='velocity'),
    'variance preserving': variant(variance_preserving=True),
    'direct distance, too': variant(anchor=1.0),
    'a denoiser that learns': variant(
        10.0,
        normalise=True,
        smooth_time=True,
        zero_init=True,
        detach=True,
        variance_preserving=True,
        prediction='velocity',
    ),
    'warm-up': scheduled(warmup=1),
    'decay': scheduled(decay=6),
    # with what the head says
    'diffkd, head': dict(pairs=HEAD),
    'pkd, head': dict(plain('PKDLoss', 6.0), pairs=HEAD),
    # what people would use instead
    'fitnet': plain('MSELoss', 5.0),
    'pkd': plain('PKDLoss', 6.0),
    'cwd': plain('ChannelWiseDivergence'),
    'fitnet of features': of_features(5.0, denoise=False),
    'pkd of features': of_features(6.0, 'PKDLoss', denoise=False),
    'cwd of features': of_features(1.0, 'ChannelWiseDivergence', denoise=False),
    'diffkd of features': of_features(5.0),
    'dist': plain('DISTLoss', align=False),
    'cwd of logits': plain('ChannelWiseDivergence', 3.0, align=False, tau=4.0),
}
# loss weights that are tried on the validation split, with one seed: the usual one and a third and three times as much
WEIGHTS = dict(
    deeppcb={
        'fitnet': (1.7, 15),
        'pkd': (2, 18),
        'cwd': (0.3, 3),
        'diffkd': (1.7, 15),
        'diffkd, attention': (1.7, 15),
    },
    camvid={
        'dist': (0.3, 3),
        'cwd of logits': (1, 9),
        'fitnet of features': (1.7, 15),
        'pkd of features': (2, 18),
        'cwd of features': (0.3, 3),
        'diffkd': (0.3, 3),
        'diffkd of features': (1.7, 15),
    },
)
DISTANCES = dict(deeppcb='MSELoss', camvid='DISTLoss')  # of DiffKD

RECIPES = ['steps=3', 'steps=1', 'backprop_steps=1', 'share_levels', 'latent_channels=32', 'latent_channels=16']
GROUPS = {
    'recipes': ['alone', 'diffkd', *RECIPES, 'interval=2'],
    'parts': [
        'alone',
        'diffkd',
        'gamma=1',
        'gamma=0.9',
        'start_timestep=500',
        'loss_diffusion_weight=0',
        'levels=[0]',
        'levels=[0, 1]',
    ],
    'variants': [
        'alone',
        'diffkd',
        'without proj',
        'normalised features',
        'GroupNorm',
        'smooth time, zero init',
        'learning rate x10',
        'no denoiser gradient',
        'x0 prediction',
        'v prediction',
        'variance preserving',
        'direct distance, too',
        'a denoiser that learns',
        'warm-up',
        'decay',
        'diffkd, attention',
        'diffkd, cwd',
        'diffkd, head',
        'pkd, head',
    ],
    'detection': ['alone', 'fitnet', 'pkd', 'cwd', 'diffkd', 'diffkd, attention', 'plus'],
    'segmentation': [
        'alone',
        'dist',
        'cwd of logits',
        'fitnet of features',
        'pkd of features',
        'cwd of features',
        'diffkd',
        'diffkd of features',
        'plus',
    ],
    'weights': [],
}


def methods_of(name: str, group: str) -> list:
    """The methods of a group; of weights, those of a set."""
    if group != 'weights':
        return GROUPS[group]
    grid = WEIGHTS[name].items()
    return [method for usual, weights in grid for method in (usual, *(f'{usual}, weight {w:g}' for w in weights))]


def changes_of(name: str, method: str) -> Optional[dict]:
    """What a method changes in the config of a set; 'pkd, weight 2' is 'pkd' with that weight of its distance."""
    method, _, weight = method.partition(', weight ')
    changes = copy.deepcopy(METHODS[method])
    if weight:
        if changes.get('distill', changes) is None:
            raise ValueError(f'{method} has several distances: it has no one weight.')
        pair = changes['distill']['feat'] if changes.get('distill') else changes
        neck = pair.setdefault('neck', {})
        neck.setdefault('distance', dict(type=f'mmdiffkd.{DISTANCES[name]}'))['loss_weight'] = float(weight)
    return changes
