# Methods whose distillation weight decays to 0 by a cosine, over the second half or the last sixth of 3000 iterations.
#
# Nothing in this file has been measured yet. Hypothesis: the decay raises the mIoU of at least one method. The
# hypothesis is falsified if no method with decay is above the same method without decay. "Above" means the mean paired
# difference of mIoU over three seeds, on the validation split. Different methods are compared only with the same decay.
_base_ = './camvid_candidates.py'
lengths = dict(half=1500, sixth=500)
arms = dict(_delete_=True)
for name in ('plus', 'pkd', 'generate_T=100', 'bridge', 'skip_denoiser'):
    arms[name] = _base_.arms[name]
    for part in lengths:
        hook = dict(type='mmdiffkd.DistillScheduleHook', decay=lengths[part], decay_curve='cosine', by_epoch=False)
        arms[f'{name}_decay={part}'] = dict(_base_.arms[name], custom_hooks=[hook])
