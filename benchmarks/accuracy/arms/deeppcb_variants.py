# Changes to the method of DiffKD. They are compared on the validation split.
custom_imports = dict(imports=['benchmarks.accuracy.variants'], allow_failed_imports=False)


def diffkd(**neck):
    """Return DiffKD with changes to its neck."""
    return dict(preset='diffkd', distill=dict(fpn=dict(neck=neck)))


def variant(**kwargs):
    """Return DiffKD with a :class:`benchmarks.accuracy.variants.VariantNeck`."""
    return diffkd(type='mmdiffkd.VariantNeck', **kwargs)


arms = {
    'diffkd': dict(preset='diffkd'),
    'no_denoiser_gradient': variant(detach=True),
    'warm-up': dict(preset='diffkd', custom_hooks=[dict(type='mmdiffkd.DistillScheduleHook', warmup=1)]),
    'normalized_features': variant(normalize=True),
    'GroupNorm': variant(group_norm=True),
    'x0_prediction': diffkd(scheduler=dict(prediction_type='sample')),
    'v_prediction': diffkd(scheduler=dict(prediction_type='v_prediction')),
    'variance_preserving': variant(variance_preserving=True),
    'diffkd_attention': diffkd(loss_kd=dict(type='mmdiffkd.AttentionMSELoss', loss_weight=5.0)),
}
