# Compare loss_weight='auto' with hand-tuned weights. Each preset is trained with 'auto', with its default weight (the
# arm with the name of the preset) and with three other weights.
heads = ('cls', 'reg')
weights = {
    'fitnet': (0.6, 1.7, 15.0),
    'pkd': (2.0, 18.0, 54.0),
    'cwd': (1.0, 3.0, 30.0),
    'cwd_norm': (0.3, 3.0, 10.0),
    'at': (25.0, 80.0, 800.0),
    'mgd': (6e-6, 6e-5, 2e-4),
    'plus': (1.7, 15.0, 45.0),
    'cwd_head': (0.3, 1.0, 10.0),
}
arms = {}
for name in weights:
    pairs = ('fpn', *heads) if name in ('plus', 'cwd_head') else ('fpn',)
    arms[name] = dict(preset=name)
    for weight in weights[name]:
        arms[f'{name}_weight={weight:g}'] = dict(preset=name, loss_weight=dict(fpn=weight))
    arms[f'{name}_auto'] = dict(preset=name, loss_weight={pair: 'auto' for pair in pairs})
