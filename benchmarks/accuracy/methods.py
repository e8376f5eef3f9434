"""Methods to compare. Each method is a dict of changes to the DiffKD config of a data set.

``neck`` is merged into the neck of the data set's pair, ``levels`` sets the levels of this pair, ``pairs`` adds pairs,
``distill`` replaces all pairs, ``preset`` sets the preset of the distiller, and ``hooks`` adds hooks to the run.
``None`` trains the student alone.
"""

import copy
from typing import Optional, Sequence

import benchmarks.accuracy.variants  # noqa: F401  registers the neck
from benchmarks.accuracy.groups import base_of


def schedule(**kwargs) -> dict:
    """Return changes to the noise schedule."""
    return dict(neck=dict(scheduler=kwargs))


def plain(distance: str, loss_weight: float = 1.0, align: bool = True, **kwargs) -> dict:
    """Return changes that compare the features directly, without denoising."""
    distance = dict(type=f'mmdiffkd.{distance}', loss_weight=loss_weight, **kwargs)
    return dict(neck=dict(denoise=False, align=align, loss_kd=distance))


def scheduled(**kwargs) -> dict:
    """Return changes that schedule the distillation with a hook."""
    return dict(hooks=[dict(type='mmdiffkd.DistillScheduleHook', **kwargs)])


def variant(**kwargs) -> dict:
    """Return changes to the method itself; see :class:`benchmarks.accuracy.variants.Variant`."""
    return dict(neck=dict(type='mmdiffkd.VariantNeck', **kwargs))


def mgd(loss_weight: float = 5.0) -> dict:
    """Return the config of the neck of masked generative distillation.

    The loss is the mean over elements. The sum of the authors gives large levels more weight.
    """
    return dict(type='mmdiffkd.MGDNeck', loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=loss_weight))


def of_features(neck: dict, levels: Sequence[int] = (-1,), **pairs) -> dict:
    """Return changes that distill the feature maps of a segmentor's backbone instead of the logits."""
    return dict(
        distill=dict(feat=dict(student='backbone', teacher='backbone', levels=list(levels), neck=neck), **pairs)
    )


def denoised(distance: str = 'MSELoss', loss_weight: float = 5.0, **kwargs) -> dict:
    """Return the config of a neck that denoises and then applies this distance."""
    return dict(loss_kd=dict(type=f'mmdiffkd.{distance}', loss_weight=loss_weight), **kwargs)


def of_layer(path: str, **distance) -> dict:
    """Return a pair that compares the outputs of the same layer of both heads directly."""
    return dict(student=path, teacher=path, neck=dict(denoise=False, align=False, loss_kd=distance))


LAST_TWO = (-2, -1)
HEAD = dict(
    cls=of_layer('bbox_head.retina_cls', type='mmdiffkd.ChannelWiseDivergence'),
    reg=of_layer('bbox_head.retina_reg', type='mmdet.L1Loss'),
)


METHODS = {
    'alone': None,
    'diffkd': dict(),
    'plus': dict(preset='plus', distill=None),
    # DiffKD without some of its parts, and cheaper settings
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
    # DiffKD with a different distance
    'diffkd, attention': dict(neck=dict(loss_kd=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0))),
    # changes to the method of DiffKD
    'normalised features': variant(normalise=True),
    'GroupNorm': variant(group_norm=True),
    'no denoiser gradient': variant(detach=True),
    'x0 prediction': schedule(prediction_type='sample'),
    'v prediction': schedule(prediction_type='v_prediction'),
    'variance preserving': variant(variance_preserving=True),
    'warm-up': scheduled(warmup=1),
    # distillation of the head's outputs
    'head': dict(distill=HEAD),
    'cwd, head': dict(plain('ChannelWiseDivergence', 3.0), pairs=HEAD),
    'plus, not denoised': dict(variant(denoising=False), pairs=HEAD),
    # distillation of a segmentor's features
    'diffkd of features': of_features(denoised()),
    'features, not denoised': of_features(variant(denoising=False, **denoised())['neck']),
    'plus, loss_weight=15': of_features(denoised(loss_weight=15.0, num_grad_steps=1)),
    'plus, pkd': of_features(denoised('PKDLoss', 6.0, num_grad_steps=1)),
    'plus, two levels': of_features(denoised(num_grad_steps=1), LAST_TWO),
    'plus, two levels, pkd': of_features(denoised('PKDLoss', 6.0, num_grad_steps=1), LAST_TWO),
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
    # methods of other papers
    'fitnet': plain('MSELoss', 5.0),
    'pkd': plain('PKDLoss', 6.0),
    'cwd': plain('ChannelWiseDivergence'),
    'mgd': dict(neck=mgd()),
    'fitnet of features': of_features(plain('MSELoss', 5.0)['neck']),
    'pkd of features': of_features(plain('PKDLoss', 6.0)['neck']),
    'pkd of two levels': of_features(plain('PKDLoss', 6.0)['neck'], LAST_TWO),
    'cwd of features': of_features(plain('ChannelWiseDivergence')['neck']),
    'mgd of features': of_features(mgd()),
    'dist': plain('DISTLoss', align=False),
    'cwd of logits': plain('ChannelWiseDivergence', 3.0, align=False, tau=4.0),
}
DISTANCES = dict(deeppcb='MSELoss', camvid='DISTLoss')  # distance of DiffKD, by data set


def changes_of(name: str, method: str) -> Optional[dict]:
    """Return the changes of a method to the config of a data set.

    Args:
        name (str): Name of the data set.
        method (str): Key of ``METHODS``, optionally with a loss weight, such as ``'pkd, weight 2'``.

    Raises:
        ValueError: If a weight is given for a method with several distances.
    """
    method, _, weight = method.partition(', weight ')
    changes = copy.deepcopy(METHODS[method])
    if weight:
        if changes.get('distill', changes) is None:
            raise ValueError(f'{method} has several distances, so a single loss weight cannot be set.')
        pair = changes['distill']['feat'] if changes.get('distill') else changes
        neck = pair.setdefault('neck', {})
        neck.setdefault('loss_kd', dict(type=f'mmdiffkd.{DISTANCES[base_of(name)]}'))['loss_weight'] = float(weight)
    return changes
