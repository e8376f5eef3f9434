# The distillation fades out by a cosine, over the second half or the last sixth of 18 epochs.
#
# Nothing here has been measured yet. A student may follow the teacher where its own loss would do better in the end.
# Falsified if no method is above itself without decay: the mean paired difference of AP over three seeds, on the
# validation split. Methods are compared with each other only with the same decay.
_base_ = './deeppcb_candidates.py'
lengths = dict(half=9, sixth=3)
arms = dict(_delete_=True)
for name in ('plus', 'cwd_head', 'plus_bckd', 'cwd_bckd', 'judge', 'generate_T=100', 'bridge'):
    arms[name] = _base_.arms[name]
    for part in lengths:
        hook = dict(type='mmdiffkd.DistillScheduleHook', decay=lengths[part], decay_curve='cosine')
        arms[f'{name}_decay={part}'] = dict(_base_.arms[name], custom_hooks=[hook])
