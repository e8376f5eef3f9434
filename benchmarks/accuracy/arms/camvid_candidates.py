# Methods that may replace the preset plus; see benchmarks/accuracy/candidates.py. deeppcb_candidates.py has the methods
# for heads of detectors as well.
#
# Nothing here has been measured yet. All arms are screened with seed 0 on the validation split with three times the
# schedule. What is less than 1 mIoU below the best arm is trained with three seeds. "Above" and "below" mean the mean
# paired difference of mIoU over these seeds. A candidate is dropped if what its comment says does not hold.
custom_imports = dict(imports=['benchmarks.accuracy.candidates'], allow_failed_imports=False)


def features(**neck):
    """Return a method with this neck for the last feature map of the backbone."""
    return dict(preset='plus', distill=dict(feat=dict(neck=neck)))


def mse(weight):
    """Return the mean squared error."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def generation(max_timestep):
    """Return generation from noise of a fixed level."""
    distance = dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=9.0)
    return features(type='mmdiffkd.NoisyGenerationNeck', max_timestep=max_timestep, loss_kd=distance)


def bridge(pull):
    """Return the regression bridge."""
    return features(type='mmdiffkd.BridgeNeck', pull=pull, loss_kd=mse(5.0))


arms = {
    # The reference and the best baseline.
    'plus': dict(preset='plus'),
    'pkd': dict(preset='pkd'),
    # Falsified if generate_T=0 is not below the better of the other two.
    'generate_T=0': generation(0),
    'generate_T=100': generation(100),
    'generate_T=300': generation(300),
    # Falsified if bridge is not above bridge_matched_mse.
    'bridge': bridge('through'),
    'bridge_matched_mse': bridge('teacher'),
    'bridge_refined': bridge('refined'),
    # Falsified if skip_denoiser is not above skip_denoiser_gamma=1, or gamma ends above 0.99.
    'skip_denoiser': features(type='mmdiffkd.SkipDiffusionNeck', loss_kd=mse(3.0)),
    'skip_denoiser_gamma=1': features(
        type='mmdiffkd.SkipDiffusionNeck', noise_adapter=dict(type='mmdiffkd.FixedGamma'), loss_kd=mse(3.0)
    ),
}
