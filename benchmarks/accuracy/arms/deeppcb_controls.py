# Which part of the preset plus helps? Each arm changes one part and keeps the pairs of the heads.
#
# Nothing here has been measured yet. An arm explains a gain if its mean paired difference to plus over three seeds, on
# the validation split with --schedule 3, is not below zero.
_base_ = './deeppcb_preset.py'
custom_imports = dict(
    imports=['benchmarks.accuracy.controls', 'benchmarks.accuracy.variants'], allow_failed_imports=False
)


def plus(**neck):
    """Return the preset plus with another neck for the features, and the same pairs of the heads."""
    return dict(preset='plus', distill=dict(fpn=dict(neck=neck), cls={}, reg={}))


def mse(weight):
    """Return the distance of plus."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def direct(loss_kd):
    """Return plus_not_denoised, that is alignment, convolution with BatchNorm and distance, with another distance."""
    return plus(type='mmdiffkd.VariantNeck', denoising=False, loss_kd=loss_kd)


arms = {
    '_delete_': True,
    'plus': dict(preset='plus'),
    # The best baseline without denoising, with the same heads.
    'cwd_head': dict(preset='cwd_head'),
    # The distance of plus and its heads alone. The difference to plus_not_denoised is the convolution with BatchNorm.
    'mse_head': plus(denoise=False, loss_kd=mse(5.0)),
    # Without denoising, the student gets a smaller gradient. If plus_not_denoised is below plus, but one of the next
    # two arms is not, the denoising steps only scale the gradient: by a constant, or as a warm-up. The factors are
    # those measured for the gradient of plus.
    'plus_not_denoised': _base_.arms['plus_not_denoised'],
    'plus_not_denoised_x1.5': direct(mse(7.5)),
    'plus_not_denoised_ramp': direct(dict(type='mmdiffkd.RampedMSELoss', loss_weight=5.0)),
    # One step whose prediction is detached. At t=0, as the released schedule has it for one step, the denoiser changes
    # the sample by 1%; at t=400, by all the noise it finds. If t=0 is not below plus, the denoiser does not help. If
    # t=400 is not below plus but t=0 is, the denoiser helps without the gradient of the distance and without steps.
    'no_grad_t=0': plus(type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1)),
    'no_grad_t=400': plus(
        type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1, start_timestep=400)
    ),
    # The denoiser's last BatchNorm subtracts a pattern of fixed size at every step. If this arm is not above plus, that
    # error is not what limits the denoising.
    'no_last_norm': plus(denoiser=dict(type='mmdiffkd.DenoiserWithoutLastNorm')),
    # One pass of the denoiser's layers without noise, behind a straight-through estimator. If it is not below plus, the
    # gain of plus does not come from diffusion.
    'refiner': plus(type='mmdiffkd.PlainRefinementNeck', loss_kd=mse(5.0)),
}
