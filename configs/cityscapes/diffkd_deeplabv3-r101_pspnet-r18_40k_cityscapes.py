# DeepLabV3 R101 -> PSPNet R18 on Cityscapes, 40k iterations.
# Val mIoU in the paper: teacher 78.07, student alone 72.55, distilled student 75.83.
_base_ = './diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes.py'
# `from ... import` would make mmengine read this file as a pure Python config
resolve_config = __import__('mmdiffkd.utils').utils.resolve_config
student = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
model = dict(student=dict(_delete_=True, **resolve_config(student).model))
