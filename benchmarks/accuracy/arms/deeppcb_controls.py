# Find out which parts of the preset 'plus' help. Each arm (method) changes one part and keeps the pairs of the heads.
#
# Nothing in this file has been measured yet. If an arm is not below 'plus', the part that the arm removes is not needed
# for the gain of 'plus'. "Below" and "above" compare the AP on the validation split, as the mean over the same three
# seeds, with --schedule 3.
_base_ = './deeppcb_preset.py'
custom_imports = dict(
    imports=['benchmarks.accuracy.controls', 'benchmarks.accuracy.variants'], allow_failed_imports=False
)


def plus(**neck):
    """Return the preset ``plus`` with changes to the neck of the FPN features. The pairs of the heads stay the same."""
    return dict(preset='plus', distill=dict(fpn=dict(neck=neck), cls={}, reg={}))


def mse(weight):
    """Return the config of the mean squared error, the distance of ``plus``, with this loss weight."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def direct(loss_kd):
    """Return the arm ``plus_not_denoised`` with another distance, ``loss_kd``.

    The arm consists of alignment, a convolution with BatchNorm, and the distance. The pairs of the heads stay the same.
    """
    return plus(type='mmdiffkd.VariantNeck', denoising=False, loss_kd=loss_kd)


arms = {
    '_delete_': True,
    'plus': dict(preset='plus'),
    # The best baseline. It does not denoise, and it has the same pairs of the heads as 'plus'.
    'cwd_head': dict(preset='cwd_head'),
    # 'plus' reduced to the distance of the features and the pairs of the heads. 'plus_not_denoised' also has a
    # convolution with BatchNorm.
    'mse_head': plus(denoise=False, loss_kd=mse(5.0)),
    # Without denoising, the student gets a smaller gradient. The two arms after 'plus_not_denoised' enlarge the
    # gradient, one by a constant factor, the other by a factor that rises in the first iterations. Both factors come
    # from measurements of the gradient of 'plus'. If 'plus_not_denoised' is below 'plus' and one of these two arms is
    # not, the denoising steps help only by scaling the gradient.
    'plus_not_denoised': _base_.arms['plus_not_denoised'],
    'plus_not_denoised_x1.5': direct(mse(7.5)),
    'plus_not_denoised_ramp': direct(dict(type='mmdiffkd.RampedMSELoss', loss_weight=5.0)),
    # A single denoising step, in which the denoiser's prediction is detached. With one step, the schedule of the
    # released code starts at t=0, where the denoiser changes the sample by only 1%. At t=400, the step removes all
    # noise that the denoiser predicts. If 'no_grad_t=0' is not below 'plus', the denoiser does not help. If
    # 'no_grad_t=0' is below 'plus' and 'no_grad_t=400' is not, the denoiser helps even with a single step and without
    # the gradient of the distance through the denoiser.
    'no_grad_t=0': plus(type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1)),
    'no_grad_t=400': plus(
        type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1, start_timestep=400)
    ),
    # The denoiser ends with a BatchNorm, so its prediction has the same variance for every input, and each step
    # subtracts some noise even from a clean feature. If the arm without this BatchNorm is not above 'plus', this error
    # does not limit the denoising.
    'no_last_norm': plus(denoiser=dict(type='mmdiffkd.DenoiserWithoutLastNorm')),
    # One pass through the denoiser's layers, without noise; a straight-through estimator passes the gradient to the
    # student. If this arm is not below 'plus', the gain of 'plus' does not come from diffusion.
    'refiner': plus(type='mmdiffkd.PlainRefinementNeck', loss_kd=mse(5.0)),
}
