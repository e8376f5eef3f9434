# The teacher: mmseg's DeepLabV3 on a ResNet-18 of half the usual width, trained from scratch.
_base_ = [
    __import__('mmseg').__path__[0] + '/.mim/configs/_base_/models/deeplabv3_r50-d8.py',
    '../_base_/camvid.py',
]
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    pretrained=None,
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(in_channels=256, channels=64, dilations=(1, 3, 6, 9), num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=11, norm_cfg=norm_cfg),
)
