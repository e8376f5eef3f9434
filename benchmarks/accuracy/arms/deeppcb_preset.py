# The preset 'plus', and methods with only some of its parts.
custom_imports = dict(imports=['benchmarks.accuracy.variants'], allow_failed_imports=False)


def of_layer(path, **distance):
    """Return a pair that compares the outputs of the same layer in both heads, without denoising."""
    return dict(student=path, teacher=path, neck=dict(denoise=False, align=False, loss_kd=distance))


head = dict(
    cls=of_layer('bbox_head.retina_cls', type='mmdiffkd.ChannelWiseDivergence'),
    reg=of_layer('bbox_head.retina_reg', type='mmdet.L1Loss'),
)
not_denoised = dict(neck=dict(type='mmdiffkd.VariantNeck', denoising=False))
arms = {
    'head': dict(preset='diffkd', distill=head),
    'cwd_head': dict(preset='cwd_head'),
    'plus_not_denoised': dict(preset='diffkd', distill=dict(fpn=not_denoised, **head)),
    'diffkd': dict(preset='diffkd'),
    'num_grad_steps=1': dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(num_grad_steps=1)))),
    'plus': dict(preset='plus'),
}
