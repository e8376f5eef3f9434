# DeepLabV3 R101 -> R18 on Cityscapes, 40k iterations. The student starts without ImageNet weights.
# Val mIoU in the paper: teacher 78.07, student alone 65.17, distilled student 74.45.
_base_ = './diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes.py'
model = dict(student=dict(pretrained=None))
