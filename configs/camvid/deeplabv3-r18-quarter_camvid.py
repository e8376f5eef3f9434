# The student: the same segmentor with half of the teacher's width.
_base_ = './deeplabv3-r18-half_camvid.py'
model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    decode_head=dict(in_channels=128, channels=32),
    auxiliary_head=dict(in_channels=64, channels=16),
)
