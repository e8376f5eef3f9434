# Methods whose distillation weight decays to 0 along a cosine curve, over the second half or the last sixth of the 18
# epochs.
#
# Nothing in this file has been measured yet. Hypothesis: late in training, the distillation loss hinders the student
# where the teacher is wrong, so the decay raises the AP of at least one method. The hypothesis is falsified if no
# method with decay is above the same method without decay. "Above" means a higher AP on the validation split, as the
# mean over the same three seeds. Different methods are compared only if they have the same decay.
_base_ = './deeppcb_candidates.py'
lengths = dict(half=9, sixth=3)
arms = dict(_delete_=True)
for name in ('plus', 'cwd_head', 'plus_bckd', 'cwd_bckd', 'judge', 'generate_T=100', 'bridge'):
    arms[name] = _base_.arms[name]
    for part in lengths:
        hook = dict(type='mmdiffkd.DistillScheduleHook', decay=lengths[part], decay_curve='cosine')
        arms[f'{name}_decay={part}'] = dict(_base_.arms[name], custom_hooks=[hook])
