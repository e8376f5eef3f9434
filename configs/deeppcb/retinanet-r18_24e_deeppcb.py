# The student: the teacher's RetinaNet on a ResNet-18 instead of a ResNet-50.
_base_ = './retinanet-r50_24e_deeppcb.py'
model = dict(backbone=dict(depth=18), neck=dict(in_channels=[64, 128, 256, 512]))
