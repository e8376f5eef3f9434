# The student: the same classifier with a quarter of the teacher's channels.
_base_ = './resnet18-half_12e_shape-classes.py'
model = dict(backbone=dict(base_channels=8, stem_channels=8), head=dict(in_channels=64))
