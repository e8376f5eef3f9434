# The config to start with: RetinaNet R101 -> R50 on COCO, 2x schedule. All other configs are in the folders next to it.
_base_ = './coco/diffkd_retinanet-r101_retinanet-r50_2x_coco.py'
