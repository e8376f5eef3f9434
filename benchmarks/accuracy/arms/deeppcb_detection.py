# Methods with the loss weights that were chosen on the validation split (deeppcb_weights.py), and DiffKD with the
# paper's settings.
attention = dict(type='mmdiffkd.AttentionMSELoss', loss_weight=45.0)
arms = {
    'fitnet_weight=1.7': dict(preset='fitnet', loss_weight=1.7),
    'pkd_weight=54': dict(preset='pkd', loss_weight=54.0),
    'cwd_weight=3': dict(preset='cwd', loss_weight=3.0),
    'cwd_head': dict(preset='cwd_head'),
    'diffkd': dict(preset='diffkd'),
    'diffkd_weight=1.7': dict(preset='diffkd', loss_weight=1.7),
    'diffkd_attention_weight=45': dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(loss_kd=attention)))),
    'plus': dict(preset='plus'),
}
