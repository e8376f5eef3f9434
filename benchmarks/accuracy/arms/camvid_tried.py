# Alternatives to the preset 'plus'. They are compared on the validation split.
def denoised(distance='MSELoss', weight=5.0, **kwargs):
    """Return a neck that denoises. The distance is backpropagated through the last denoising step only."""
    return dict(loss_kd=dict(type=f'mmdiffkd.{distance}', loss_weight=weight), num_grad_steps=1, **kwargs)


def of_layer(path, neck, levels=None):
    """Return a pair that compares the outputs of the same layer in both models."""
    return dict(student=path, teacher=path, levels=levels, neck=neck)


def of_features(neck, levels=(-1,), **pairs):
    """Return a method that compares feature maps of both backbones. ``pairs`` are additional pairs."""
    return dict(preset='diffkd', distill=dict(feat=of_layer('backbone', neck, list(levels)), **pairs))


def direct(distance, **kwargs):
    """Return a neck that compares features without denoising."""
    return dict(denoise=False, loss_kd=dict(type=f'mmdiffkd.{distance}', **kwargs))


last_two = (-2, -1)
arms = {
    'diffkd_features': of_features(dict(loss_kd=dict(type='mmdiffkd.MSELoss', loss_weight=5.0))),
    'plus': dict(preset='plus'),
    'plus_two_maps': of_features(denoised(), last_two),
    'plus_two_maps_pkd': of_features(denoised('PKDLoss', 6.0), last_two),
    'plus_weight=15': dict(preset='plus', loss_weight=15.0),
    'plus_pkd': of_features(denoised('PKDLoss', 6.0)),
    'plus_four_maps': of_features(denoised(), (-4, -3, -2, -1)),
    'plus+direct_pkd': of_features(denoised(), direct=of_layer('backbone', direct('PKDLoss', loss_weight=6.0), [-1])),
    'plus+dist_of_logits': of_features(
        denoised(), logits=of_layer('decode_head.conv_seg', dict(direct('DISTLoss'), align=False))
    ),
    'plus+aspp': of_features(denoised(), aspp=of_layer('decode_head.bottleneck', denoised())),
}
