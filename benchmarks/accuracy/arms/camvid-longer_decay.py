# Methods whose distillation weight decays to 0 along a cosine curve, over the second half or the last sixth of the 3000
# iterations.
#
# Nothing in this file has been measured yet. Hypothesis: the decay raises the mIoU of at least one method. The
# hypothesis is falsified if no method with decay is above the same method without decay. "Above" means a higher mIoU on
# the validation split, as the mean over the same three seeds. Different methods are compared only if they have the same
# decay.
_base_ = './camvid_candidates.py'
lengths = dict(half=1500, sixth=500)
arms = dict(_delete_=True)
for name in ('plus', 'pkd', 'generate_T=100', 'bridge', 'skip_denoiser'):
    arms[name] = _base_.arms[name]
    for part in lengths:
        hook = dict(type='mmdiffkd.DistillScheduleHook', decay=lengths[part], decay_curve='cosine', by_epoch=False)
        arms[f'{name}_decay={part}'] = dict(_base_.arms[name], custom_hooks=[hook])
