# This config trains three times as long as camvid_student.py.
_base_ = './camvid_student.py'
max_iters = 3000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_iters)
