"""What is compared: changes to the plain DiffKD config of a set.

``neck`` is merged into the neck of the set's pair, ``levels`` are those of the pair, ``pairs`` are added to it,
``distill`` stands in its place, ``preset`` is the distiller's, ``hooks`` are added to the run. ``None`` trains the
student alone.
"""

import copy
from typing import Optional, Sequence

import benchmarks.accuracy.mgd  # noqa: F401  registers it
import benchmarks.accuracy.variants  # noqa: F401  registers them
from benchmarks.accuracy.groups import base_of


def schedule(**kwargs) -> dict:
    """Another noise schedule."""
    return dict(neck=dict(scheduler=kwargs))


def plain(distance: str, loss_weight: float = 1.0, align: bool = True, **kwargs) -> dict:
    """A distance without denoising."""
    distance = dict(type=f'mmdiffkd.{distance}', loss_weight=loss_weight, **kwargs)
    return dict(neck=dict(denoise=False, align=align, loss_kd=distance))


def scheduled(**kwargs) -> dict:
    """Distillation that is not the same in all iterations."""
    return dict(hooks=[dict(type='mmdiffkd.DistillScheduleHook', **kwargs)])


def variant(**kwargs) -> dict:
    """A change to the method itself."""
    return dict(neck=dict(type='mmdiffkd.VariantNeck', **kwargs))


def mgd(loss_weight: float = 5.0) -> dict:
    """The neck of masked generative distillation."""
    return dict(type='mmdiffkd.MGDNeck', loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=loss_weight))


def of_features(neck: dict, levels: Sequence[int] = (-1,), **pairs) -> dict:
    """A segmentor's last feature maps in place of its logits."""
    return dict(
        distill=dict(feat=dict(student='backbone', teacher='backbone', levels=list(levels), neck=neck), **pairs)
    )


def denoised(distance: str = 'MSELoss', loss_weight: float = 5.0, **kwargs) -> dict:
    """A neck that denoises, with its distance."""
    return dict(loss_kd=dict(type=f'mmdiffkd.{distance}', loss_weight=loss_weight), **kwargs)


def of_layer(path: str, **distance) -> dict:
    """What a layer of both heads says, compared as it is."""
    return dict(student=path, teacher=path, neck=dict(denoise=False, align=False, loss_kd=distance))


TWO = (-2, -1)
HEAD = dict(
    cls=of_layer('bbox_head.retina_cls', type='mmdiffkd.ChannelWiseDivergence'),
    reg=of_layer('bbox_head.retina_reg', type='mmdet.L1Loss'),
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
    'num_grad_steps=1': dict(neck=dict(num_grad_steps=1)),
    'share_levels': dict(neck=dict(share_levels=True)),
    'latent_channels=32': dict(neck=dict(latent_channels=32)),
    'latent_channels=16': dict(neck=dict(latent_channels=16)),
    'interval=2': scheduled(interval=2, by_epoch=False),
    # with another distance
    'diffkd, attention': dict(neck=dict(loss_kd=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0))),
    # the method changed
    'normalised features': variant(normalise=True),
    'GroupNorm': variant(group_norm=True),
    'no denoiser gradient': variant(detach=True),
    'x0 prediction': schedule(prediction_type='sample'),
    'v prediction': schedule(prediction_type='v_prediction'),
    'variance preserving': variant(variance_preserving=True),
    'warm-up': scheduled(warmup=1),
    # with what the head says
    'head': dict(distill=HEAD),
    'cwd, head': dict(plain('ChannelWiseDivergence', 3.0), pairs=HEAD),
    'plus, not denoised': dict(variant(denoising=False), pairs=HEAD),
    # of segmentors
    'diffkd of features': of_features(denoised()),
    'features, not denoised': of_features(variant(denoising=False, **denoised())['neck']),
    'plus, loss_weight=15': of_features(denoised(loss_weight=15.0, num_grad_steps=1)),
    'plus, pkd': of_features(denoised('PKDLoss', 6.0, num_grad_steps=1)),
    'plus, two levels': of_features(denoised(num_grad_steps=1), TWO),
    'plus, two levels, pkd': of_features(denoised('PKDLoss', 6.0, num_grad_steps=1), TWO),
    'plus, four levels': of_features(denoised(num_grad_steps=1), (-4, -3, -2, -1)),
    'plus and direct pkd': of_features(
        denoised(num_grad_steps=1), direct=of_features(plain('PKDLoss', 6.0)['neck'])['distill']['feat']
    ),
    'plus and dist of logits': of_features(
        denoised(num_grad_steps=1), logits=of_layer('decode_head.conv_seg', type='mmdiffkd.DISTLoss')
    ),
    'plus and ASPP': of_features(
        denoised(num_grad_steps=1),
        aspp=dict(student='decode_head.bottleneck', teacher='decode_head.bottleneck', neck=denoised(num_grad_steps=1)),
    ),
    # what people would use instead
    'fitnet': plain('MSELoss', 5.0),
    'pkd': plain('PKDLoss', 6.0),
    'cwd': plain('ChannelWiseDivergence'),
    'mgd': dict(neck=mgd()),
    'fitnet of features': of_features(plain('MSELoss', 5.0)['neck']),
    'pkd of features': of_features(plain('PKDLoss', 6.0)['neck']),
    'pkd of two levels': of_features(plain('PKDLoss', 6.0)['neck'], TWO),
    'cwd of features': of_features(plain('ChannelWiseDivergence')['neck']),
    'mgd of features': of_features(mgd()),
    'dist': plain('DISTLoss', align=False),
    'cwd of logits': plain('ChannelWiseDivergence', 3.0, align=False, tau=4.0),
}
DISTANCES = dict(deeppcb='MSELoss', camvid='DISTLoss')  # of DiffKD


def changes_of(name: str, method: str) -> Optional[dict]:
    """What a method changes in the config of a set; 'pkd, weight 2' is 'pkd' with that weight of its distance."""
    method, _, weight = method.partition(', weight ')
    changes = copy.deepcopy(METHODS[method])
    if weight:
        if changes.get('distill', changes) is None:
            raise ValueError(f'{method} has several distances: it has no one weight.')
        pair = changes['distill']['feat'] if changes.get('distill') else changes
        neck = pair.setdefault('neck', {})
        neck.setdefault('loss_kd', dict(type=f'mmdiffkd.{DISTANCES[base_of(name)]}'))['loss_weight'] = float(weight)
    return changes
