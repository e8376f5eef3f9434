# Find out which parts of the preset plus help. Each arm (method) changes one part and keeps the pairs of the heads.
#
# Nothing in this file has been measured yet. If an arm is not below plus, the part that the arm removes is not needed
# for the gain of plus. "Below" and "above" mean the mean paired difference of AP over three seeds, on the validation
# split, with --schedule 3.
_base_ = './deeppcb_preset.py'
custom_imports = dict(
    imports=['benchmarks.accuracy.controls', 'benchmarks.accuracy.variants'], allow_failed_imports=False
)


def plus(**neck):
    """Return the preset plus with changes to the neck of the features. The pairs of the heads are the same."""
    return dict(preset='plus', distill=dict(fpn=dict(neck=neck), cls={}, reg={}))


def mse(weight):
    """Return the config of the distance of plus."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def direct(loss_kd):
    """Return plus_not_denoised with this distance: alignment, a convolution with BatchNorm, and the distance."""
    return plus(type='mmdiffkd.VariantNeck', denoising=False, loss_kd=loss_kd)


arms = {
    '_delete_': True,
    'plus': dict(preset='plus'),
    # The best baseline without denoising, with the same heads.
    'cwd_head': dict(preset='cwd_head'),
    # Only the distance of plus and the pairs of its heads. plus_not_denoised has a convolution with BatchNorm in
    # addition.
    'mse_head': plus(denoise=False, loss_kd=mse(5.0)),
    # Without denoising, the student gets a smaller gradient. The two arms after plus_not_denoised enlarge it: by a
    # constant factor, or by a factor that rises in the first iterations. Both factors were measured on the gradient of
    # plus. If plus_not_denoised is below plus and one of these two arms is not, the denoising steps help only by
    # scaling the gradient.
    'plus_not_denoised': _base_.arms['plus_not_denoised'],
    'plus_not_denoised_x1.5': direct(mse(7.5)),
    'plus_not_denoised_ramp': direct(dict(type='mmdiffkd.RampedMSELoss', loss_weight=5.0)),
    # A single denoising step whose prediction is detached. With one step, the schedule of the released code starts at
    # t=0, where the denoiser changes the sample by only 1%. At t=400, the step removes all noise that the denoiser
    # predicts. If t=0 is not below plus, the denoiser does not help. If t=0 is below plus and t=400 is not, the
    # denoiser helps even without the gradient of the distance through it, and with a single step.
    'no_grad_t=0': plus(type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1)),
    'no_grad_t=400': plus(
        type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1, start_timestep=400)
    ),
    # The denoiser ends with a BatchNorm, so its prediction has the same variance for every input, and each step
    # subtracts some noise even from a clean feature. If the arm without this BatchNorm is not above plus, this error
    # does not limit the denoising.
    'no_last_norm': plus(denoiser=dict(type='mmdiffkd.DenoiserWithoutLastNorm')),
    # One pass through the denoiser's layers, without noise; a straight-through estimator passes the gradient to the
    # student. If this arm is not below plus, the gain of plus does not come from diffusion.
    'refiner': plus(type='mmdiffkd.PlainRefinementNeck', loss_kd=mse(5.0)),
}
