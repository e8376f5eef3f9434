# DeepLabV3 R101 -> R18, the same without ImageNet weights. The paper: val mIoU 78.07 -> 65.17, distilled 74.45.
_base_ = './diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes.py'
model = dict(student=dict(pretrained=None))
