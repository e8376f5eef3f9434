# Methods that may replace the preset 'plus'; benchmarks/accuracy/candidates.py describes them. deeppcb_candidates.py
# also has methods for the heads of detectors.
#
# Nothing in this file has been measured yet. The plan: train each arm (method) with seed 0, in a schedule three times
# as long. Select the arms whose mIoU on the validation split is less than 1 below that of the best arm, and train them
# with three seeds. In the comments below, "above" and "below" compare the mean mIoU over these three seeds. A candidate
# is dropped if the condition after "Falsified if" in its comment is met.
custom_imports = dict(imports=['benchmarks.accuracy.candidates'], allow_failed_imports=False)


def features(**neck):
    """Return the preset ``plus`` with a different neck for the last feature maps of both backbones."""
    return dict(preset='plus', distill=dict(feat=dict(neck=neck)))


def mse(weight):
    """Return the config of the mean squared error with this loss weight."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def generation(max_timestep):
    """Return an arm that generates the teacher's feature from a noisy student feature."""
    distance = dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=9.0)
    return features(type='mmdiffkd.NoisyGenerationNeck', max_timestep=max_timestep, loss_kd=distance)


def bridge(pull):
    """Return an arm with the regression bridge (``BridgeNeck``) and this value of ``pull``."""
    return features(type='mmdiffkd.BridgeNeck', pull=pull, loss_kd=mse(5.0))


arms = {
    # The preset to replace, and the best baseline.
    'plus': dict(preset='plus'),
    'pkd': dict(preset='pkd'),
    # Falsified if 'generate_T=0', which adds almost no noise, is not below the better of the two arms with noise.
    'generate_T=0': generation(0),
    'generate_T=100': generation(100),
    'generate_T=300': generation(300),
    # Falsified if 'bridge' is not above 'bridge_matched_mse', the plain distance with a gradient of the same size.
    'bridge': bridge('through'),
    'bridge_matched_mse': bridge('teacher'),
    'bridge_refined': bridge('refined'),
    # Falsified if 'skip_denoiser' is not above 'skip_denoiser_gamma=1', which adds no noise. Also falsified if gamma is
    # above 0.99 at the end of the training.
    'skip_denoiser': features(type='mmdiffkd.SkipDiffusionNeck', loss_kd=mse(3.0)),
    'skip_denoiser_gamma=1': features(
        type='mmdiffkd.SkipDiffusionNeck', noise_adapter=dict(type='mmdiffkd.FixedGamma'), loss_kd=mse(3.0)
    ),
}
