# Find out which parts of the preset 'plus' help. Each arm (method) changes one part. deeppcb_controls.py explains each
# arm and how to interpret its result. The arm 'mse' has the name 'mse_head' there.
#
# Nothing in this file has been measured yet. If an arm is not below 'plus', the part that the arm removes is not needed
# for the gain of 'plus'. "Below" means a lower mIoU on the validation split, as the mean over the same three seeds, in
# a schedule three times as long.
_base_ = './camvid_preset.py'
custom_imports = dict(
    imports=['benchmarks.accuracy.controls', 'benchmarks.accuracy.variants'], allow_failed_imports=False
)


def plus(**neck):
    """Return the preset ``plus`` with changes to its neck."""
    return dict(preset='plus', distill=dict(feat=dict(neck=neck)))


def mse(weight):
    """Return the config of the mean squared error, the distance of ``plus``, with this loss weight."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def direct(loss_kd):
    """Return the arm ``plus_not_denoised`` with another distance, ``loss_kd``.

    The arm consists of alignment, a convolution with BatchNorm, and the distance.
    """
    return plus(type='mmdiffkd.VariantNeck', denoising=False, loss_kd=loss_kd)


arms = {
    '_delete_': True,
    'plus': dict(preset='plus'),
    'pkd': dict(preset='pkd'),
    'mse': plus(denoise=False, loss_kd=mse(5.0)),
    'plus_not_denoised': _base_.arms['plus_not_denoised'],
    'plus_not_denoised_x1.5': direct(mse(7.5)),
    'plus_not_denoised_ramp': direct(dict(type='mmdiffkd.RampedMSELoss', loss_weight=5.0)),
    'no_grad_t=0': plus(type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1)),
    'no_grad_t=400': plus(
        type='mmdiffkd.DetachedDiffusionNeck', scheduler=dict(num_inference_steps=1, start_timestep=400)
    ),
    'no_last_norm': plus(denoiser=dict(type='mmdiffkd.DenoiserWithoutLastNorm')),
    'refiner': plus(type='mmdiffkd.PlainRefinementNeck', loss_kd=mse(5.0)),
}
