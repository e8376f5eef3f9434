# DeepPCB at 320x320 in COCO format (tools/dataset_converters/deeppcb.py): defects of bare circuit boards.
# The objects are small (14 - 26 pixels) and similar in size. Choose settings on val, and report results on test.
_base_ = './small_detection.py'
data_root = 'data/deeppcb_coco320/'
image_size = (320, 320)
metainfo = dict(classes=('open', 'short', 'mousebite', 'spur', 'copper', 'pin-hole'))
source = dict(metainfo=metainfo, data_root=data_root, data_prefix=dict(img='images/'))

train_dataloader = dict(dataset=source)
val_dataloader = dict(dataset=source)
test_dataloader = dict(dataset=dict(ann_file='annotations/test.json', **source))
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/test.json')
