# Methods with the loss weights that were chosen on the validation split (camvid_weights.py), and DiffKD with the
# paper's settings. PKD is also run with its default weight, because over three seeds the default weight is as good as
# the chosen weight.
def of_features(weight, distance=None, levels=(-1,), **neck):
    """Return a method that compares feature maps of both backbones."""
    loss = dict(type=f'mmdiffkd.{distance}', loss_weight=weight)
    pair = dict(student='backbone', teacher='backbone', levels=list(levels), neck=dict(neck, loss_kd=loss))
    return dict(preset='diffkd', distill=dict(feat=pair))


arms = {
    'dist_weight=0.3': dict(preset='dist', loss_weight=0.3),
    'cwd_weight=0.1': dict(preset='cwd', loss_weight=0.1),
    'fitnet_weight=45': dict(preset='fitnet', loss_weight=45.0),
    'pkd_last_map': of_features(6.0, 'PKDLoss', denoise=False),
    'pkd': dict(preset='pkd'),
    'pkd_weight=2': dict(preset='pkd', loss_weight=2.0),
    'cwd_features_weight=27': of_features(27.0, 'ChannelWiseDivergence', denoise=False),
    'diffkd': dict(preset='diffkd'),
    'diffkd_weight=0.1': dict(preset='diffkd', loss_weight=0.1),
    'diffkd_features': of_features(5.0, 'MSELoss'),
    'plus': dict(preset='plus'),
}
