# The config to begin with: RetinaNet R101 -> R50 on COCO, 2x schedule. All others are in the folders beside it.
_base_ = './coco/diffkd_retinanet-r101_retinanet-r50_2x_coco.py'
