# DeepLabV3 R101 -> R18 without ImageNet weights, else the same. The paper: val mIoU 78.07 -> 65.17, distilled 74.45.
_base_ = './diffkd_deeplabv3_r101_r18.py'
model = dict(student=dict(pretrained=None))
