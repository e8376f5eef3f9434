# Generated shapes (tools/dataset_converters/make_shapes.py). Training takes a few minutes on two CPU cores.
_base_ = './small_detection.py'
data_root = 'data/shapes/'
metainfo = dict(classes=('stop sign', 'sports ball', 'kite', 'pizza', 'donut'))
image_size = (128, 128)

# images this small load faster without worker processes
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img='images/train/'),
        filter_cfg=dict(filter_empty_gt=False),
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(metainfo=metainfo, data_root=data_root, data_prefix=dict(img='images/val/')),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

max_epochs = 16
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=2))
