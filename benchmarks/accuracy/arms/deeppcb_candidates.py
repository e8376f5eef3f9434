# Methods that may replace the preset 'plus'; benchmarks/accuracy/candidates.py describes most of them.
#
# Nothing in this file has been measured yet. The plan: train each arm (method) with seed 0 and --schedule 3. Select the
# arms whose AP on the validation split is less than 1 below that of the best arm, and train them with three seeds. In
# the comments below, "above" and "below" compare the mean AP over these three seeds. A candidate is dropped if the
# condition after "Falsified if" in its comment is met.
custom_imports = dict(imports=['benchmarks.accuracy.candidates'], allow_failed_imports=False)
dense_outputs = ['bbox_head.retina_cls', 'bbox_head.retina_reg']


def features(**neck):
    """Return the preset ``plus`` with a different neck for the FPN features. The pairs of the heads stay the same."""
    return dict(preset='plus', distill=dict(fpn=dict(neck=neck), cls={}, reg={}))


def mse(weight):
    """Return the config of the mean squared error with this loss weight."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def generation(max_timestep):
    """Return an arm that generates the teacher's feature from a noisy student feature."""
    distance = dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=3.0)
    return features(type='mmdiffkd.NoisyGenerationNeck', max_timestep=max_timestep, loss_kd=distance)


def bridge(pull):
    """Return an arm with the regression bridge (``BridgeNeck``) and this value of ``pull``."""
    return features(type='mmdiffkd.BridgeNeck', pull=pull, loss_kd=mse(5.0))


arms = {
    # The preset to replace, and the best baseline. Both distill the outputs of the heads: class scores by CWD, and
    # boxes by L1.
    'plus': dict(preset='plus'),
    'cwd_head': dict(preset='cwd_head'),
    # BCKD, instead of CWD and L1, distills the outputs of the heads. AP ranks detections by their absolute scores, and
    # the spatial softmax of CWD discards the absolute values. Falsified if 'plus_bckd' is not above 'plus' and
    # 'cwd_bckd' is not above 'cwd_head'.
    'plus_bckd': dict(
        preset='plus',
        distill=dict(
            fpn={}, bckd=dict(student=dense_outputs, teacher=dense_outputs, neck=dict(type='mmdiffkd.BCKDNeck'))
        ),
    ),
    'cwd_bckd': dict(preset='cwd_bckd'),
    # The teacher's head runs on the student's features, and these outputs are compared with the teacher's outputs. A
    # difference between student and teacher features then counts only as far as it changes the outputs of the teacher's
    # head. Falsified if 'judge' is not above 'cwd_bckd', which distills the student's own head.
    'judge': dict(
        preset='crosskd',
        distill=dict(
            judge=dict(
                student=['neck'] * 3,
                teacher=[*dense_outputs, 'neck'],
                neck=dict(
                    type='mmdiffkd.HeadJudgeNeck',
                    num_convs=2,
                    cls_weight=2.0,
                    reg_weight=2.0,
                    loss_feature=dict(type='mmdiffkd.PKDLoss', loss_weight=0.5),
                ),
            )
        ),
    ),
    # The student cannot change the noise level, so the loss falls only if the student's feature has more information
    # about the teacher's feature. Falsified if 'generate_T=0', which adds almost no noise, is not below the better of
    # the two arms with noise.
    'generate_T=0': generation(0),
    'generate_T=100': generation(100),
    'generate_T=300': generation(300),
    # The student learns the part of the teacher's feature that a regression from the student's feature cannot predict.
    # Falsified if 'bridge' is not above 'bridge_matched_mse', the plain distance with a gradient of the same size. In
    # 'bridge_refined', the student learns only the part that the regression can predict. If 'bridge_refined' is not
    # below 'bridge', the idea of the bridge is wrong.
    'bridge': bridge('through'),
    'bridge_matched_mse': bridge('teacher'),
    'bridge_refined': bridge('refined'),
    # The denoiser returns a clean feature unchanged. If denoising does not help, training can turn it off by raising
    # gamma to 1. Falsified if 'skip_denoiser' is not above 'skip_denoiser_gamma=1', which is the distance of PKD
    # without denoising. Also falsified if gamma is above 0.99 on all levels at the end of the training, because then
    # almost no noise is added.
    'skip_denoiser': features(type='mmdiffkd.SkipDiffusionNeck', loss_kd=mse(3.0)),
    'skip_denoiser_gamma=1': features(
        type='mmdiffkd.SkipDiffusionNeck', noise_adapter=dict(type='mmdiffkd.FixedGamma'), loss_kd=mse(3.0)
    ),
}
