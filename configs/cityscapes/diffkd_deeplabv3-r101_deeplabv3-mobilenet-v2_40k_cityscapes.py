# DeepLabV3 R101 -> MobileNetV2 on Cityscapes, 40k iterations.
# Val mIoU in the paper: teacher 78.07, student alone 73.12, distilled student 75.71.
# mmseg's student has an auxiliary head. It is trained and distilled as in the config of DeepLabV3 R18.
_base_ = './diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes.py'
# `from ... import` would make mmengine read this file as a pure Python config
resolve_config = __import__('mmdiffkd.utils').utils.resolve_config
student = 'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py'
model = dict(student=dict(_delete_=True, **resolve_config(student).model))
optim_wrapper = dict(optimizer=dict(weight_decay=2e-4))
