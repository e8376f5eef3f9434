# Methods that may replace the preset plus; see benchmarks/accuracy/candidates.py.
#
# Nothing here has been measured yet. All arms are screened with seed 0 on the validation split with --schedule 3. What
# is less than 1 AP below the best arm is trained with three seeds. "Above" and "below" mean the mean paired difference
# of AP over these seeds. A candidate is dropped if what its comment says does not hold.
custom_imports = dict(imports=['benchmarks.accuracy.candidates'], allow_failed_imports=False)
dense_outputs = ['bbox_head.retina_cls', 'bbox_head.retina_reg']


def features(**neck):
    """Return a method with this neck for the features, and the pairs of the heads of plus."""
    return dict(preset='plus', distill=dict(fpn=dict(neck=neck), cls={}, reg={}))


def mse(weight):
    """Return the mean squared error."""
    return dict(type='mmdiffkd.MSELoss', loss_weight=weight)


def generation(max_timestep):
    """Return generation from noise of a fixed level."""
    distance = dict(type='mmdiffkd.ChannelWiseDivergence', tau=4.0, loss_weight=3.0)
    return features(type='mmdiffkd.NoisyGenerationNeck', max_timestep=max_timestep, loss_kd=distance)


def bridge(pull):
    """Return the regression bridge."""
    return features(type='mmdiffkd.BridgeNeck', pull=pull, loss_kd=mse(5.0))


arms = {
    # The reference and the best baseline, with the heads of plus: CWD of the scores, L1 of the boxes.
    'plus': dict(preset='plus'),
    'cwd_head': dict(preset='cwd_head'),
    # The heads of BCKD. The spatial softmax of CWD removes the absolute scores, by which AP ranks detections. Falsified
    # if plus_bckd is not above plus, and cwd_bckd not above cwd_head.
    'plus_bckd': dict(
        preset='plus',
        distill=dict(
            fpn={}, bckd=dict(student=dense_outputs, teacher=dense_outputs, neck=dict(type='mmdiffkd.BCKDNeck'))
        ),
    ),
    'cwd_bckd': dict(preset='cwd_bckd'),
    # The teacher's head weights the differences of the features by what they change in its outputs. Falsified if judge
    # is not above cwd_bckd, which distills the student's own head.
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
    # The noise level is fixed, so the loss falls only if the student's feature contains more of the teacher's.
    # Falsified if generate_T=0 is not below the better of the other two.
    'generate_T=0': generation(0),
    'generate_T=100': generation(100),
    'generate_T=300': generation(300),
    # The student learns what a regression from its feature cannot predict. Falsified if bridge is not above
    # bridge_matched_mse, the plain distance with a gradient of the same size. bridge_refined is the opposite: only what
    # the regression predicts. If it is not below bridge, the idea of the bridge is wrong.
    'bridge': bridge('through'),
    'bridge_matched_mse': bridge('teacher'),
    'bridge_refined': bridge('refined'),
    # The denoiser returns a clean feature unchanged, and gamma can switch the denoising off if it does not help.
    # Falsified if skip_denoiser is not above skip_denoiser_gamma=1, which is the distance of PKD without denoising; or
    # if gamma ends above 0.99 on all levels, because then nothing is denoised.
    'skip_denoiser': features(type='mmdiffkd.SkipDiffusionNeck', loss_kd=mse(3.0)),
    'skip_denoiser_gamma=1': features(
        type='mmdiffkd.SkipDiffusionNeck', noise_adapter=dict(type='mmdiffkd.FixedGamma'), loss_kd=mse(3.0)
    ),
}
