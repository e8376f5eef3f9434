# Each method with several loss weights. Most methods have the default weight (the name without a number), a third of
# the default, and three times the default. If the best weight is the smallest or the largest, up to two more weights
# extend the range.
attention = dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)
methods = {
    'fitnet': dict(preset='fitnet'),
    'pkd': dict(preset='pkd'),
    'cwd': dict(preset='cwd'),
    'diffkd': dict(preset='diffkd'),
    'diffkd_attention': dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(loss_kd=attention)))),
}
weights = {
    'fitnet': (0.6, 1.7, 15.0),
    'pkd': (2.0, 18.0, 54.0, 162.0),
    'cwd': (0.3, 1.0, 3.0, 9.0),
    'diffkd': (0.6, 1.7, 15.0),
    'diffkd_attention': (1.7, 15.0, 45.0, 135.0),
}
arms = {}
for name in methods:
    arms[name] = methods[name]
    for weight in weights[name]:
        arms[f'{name}_weight={weight:g}'] = dict(methods[name], loss_weight=weight)
