# Each method with several loss weights. Most methods have the default weight (the name without a number), a third of
# the default, and three times the default. If the best weight is the smallest or the largest, up to two more weights
# extend the range.


def of_features(distance, weight, **neck):
    """Return a method that compares the last feature maps of both backbones."""
    loss = dict(type=f'mmdiffkd.{distance}', loss_weight=weight)
    pair = dict(student='backbone', teacher='backbone', levels=[-1], neck=dict(neck, loss_kd=loss))
    return dict(preset='diffkd', distill=dict(feat=pair))


methods = {
    'dist': dict(preset='dist'),
    'cwd': dict(preset='cwd'),
    'fitnet': dict(preset='fitnet'),
    'pkd_last_map': of_features('PKDLoss', 6.0, denoise=False),
    'pkd': dict(preset='pkd'),
    'cwd_features': of_features('ChannelWiseDivergence', 1.0, denoise=False),
    'diffkd': dict(preset='diffkd'),
    'diffkd_features': of_features('MSELoss', 5.0),
}
weights = {
    'dist': (0.1, 0.3, 3.0),
    'cwd': (0.1, 0.3, 1.0),
    'fitnet': (1.7, 15.0, 45.0, 135.0),
    'pkd_last_map': (2.0, 18.0),
    'pkd': (0.6, 2.0, 18.0, 54.0),
    'cwd_features': (0.3, 3.0, 9.0, 27.0),
    'diffkd': (0.03, 0.1, 0.3, 3.0),
    'diffkd_features': (1.7, 15.0),
}
arms = {}
for name in methods:
    arms[name] = methods[name]
    for weight in weights[name]:
        arms[f'{name}_weight={weight:g}'] = dict(methods[name], loss_weight=weight)
