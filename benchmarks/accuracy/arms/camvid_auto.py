# Compare loss_weight='auto' with hand-tuned weights. Each preset is trained with 'auto', with its default weight (the
# arm with the name of the preset) and with three other weights. The preset 'mgd' has two pairs, so its arms multiply
# the default weights of both pairs by the same factor.
weights = {
    'fitnet': (1.7, 15.0, 45.0),
    'pkd': (0.6, 2.0, 18.0),
    'cwd': (0.1, 0.3, 1.0),
    'dist': (0.1, 0.3, 3.0),
    'kd': (0.1, 0.3, 3.0),
    'at': (80.0, 800.0, 2500.0),
    'plus': (1.7, 15.0, 45.0),
    'mgd': (0.1, 3.0, 10.0),
}
arms = {}
for name in weights:
    pair = 'logits' if name in ('cwd', 'dist', 'kd') else 'feat'
    arms[name] = dict(preset=name)
    for weight in weights[name]:
        changed = dict(feat=2e-5 * weight, logits=3.0 * weight) if name == 'mgd' else {pair: weight}
        arms[f'{name}_{"factor" if name == "mgd" else "weight"}={weight:g}'] = dict(preset=name, loss_weight=changed)
    auto = dict(feat='auto', logits='auto') if name == 'mgd' else {pair: 'auto'}
    arms[f'{name}_auto'] = dict(preset=name, loss_weight=auto)
