# The preset 'plus', and methods with only some of its parts.
custom_imports = dict(imports=['benchmarks.accuracy.variants'], allow_failed_imports=False)
features = dict(student='backbone', teacher='backbone', levels=[-1])
mse = dict(type='mmdiffkd.MSELoss', loss_weight=5.0)
not_denoised = dict(type='mmdiffkd.VariantNeck', denoising=False, loss_kd=mse)
arms = {
    'diffkd': dict(preset='diffkd'),
    'diffkd_features': dict(preset='diffkd', distill=dict(feat=dict(features, neck=dict(loss_kd=mse)))),
    'plus_not_denoised': dict(preset='diffkd', distill=dict(feat=dict(features, neck=not_denoised))),
    'plus': dict(preset='plus'),
}
