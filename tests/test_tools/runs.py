"""Short distillation runs of the three packages, on a few small images."""

from types import SimpleNamespace

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from tests import tiny
from tests.test_upstream import models

CLASSES = ('disk', 'ring', 'bar')
SHAPES = ('stop sign', 'sports ball', 'kite', 'pizza', 'donut')  # classes of the data set of the fixture shapes
COUNT = 3  # images
FCN = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
RUNTIME = dict(mmseg=FCN, mmpretrain='mmpretrain::resnet/resnet18_8xb32_in1k.py')


def write_images(folder):
    """Write images with label maps and in one folder per class."""
    random = np.random.default_rng(0)
    for index in range(COUNT):
        image = random.integers(0, 255, (64, 64, 3), np.uint8)
        mmcv.imwrite(image, str(folder / 'images' / f'{index}.png'))
        mmcv.imwrite(random.integers(0, 3, (64, 64), np.uint8), str(folder / 'labels' / f'{index}.png'))
        mmcv.imwrite(image, str(folder / 'folders' / CLASSES[index] / f'{index}.png'))


def detection(folder, shapes):
    models = [tiny.detector(base_channels=width, **{'bbox_head.num_classes': len(SHAPES)}) for width in (8, 16)]
    cfg = tiny.run_cfg(tiny.distiller_cfg(folder, *models), shapes, folder / 'run')
    cfg.pop('experiment_name')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.update(indices=COUNT, metainfo=dict(classes=SHAPES))
    return cfg


def segmentation(folder, shapes):
    student = models.shrunk(
        FCN,
        pretrained=None,
        backbone__depth=18,
        backbone__base_channels=8,
        backbone__stem_channels=8,
        decode_head__in_channels=64,
        decode_head__channels=16,
        decode_head__num_classes=6,
        auxiliary_head__in_channels=32,
        auxiliary_head__channels=16,
        auxiliary_head__num_classes=6,
        data_preprocessor__size=(64, 64),
    )
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    dataset = dict(
        type='PotsdamDataset',
        reduce_zero_label=False,
        data_root=str(folder),
        seg_map_suffix='.png',
        img_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=[*load, dict(type='PackSegInputs')],
    )
    cfg = plain_cfg('mmseg', folder, student, dataset, dict(type='IoUMetric'))
    cfg.test_pipeline = dataset['pipeline']  # inference_model reads it
    return cfg


def classification(folder, shapes):
    dataset = dict(
        type='CustomDataset',
        data_root=str(folder / 'folders'),
        metainfo=dict(classes=CLASSES),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )
    return plain_cfg('mmpretrain', folder, models.resnet_classifier(), dataset, dict(type='Accuracy', topk=(1,)))


def plain_cfg(package, folder, student, dataset, metric):
    """Return the config of a run without mmdiffkd's hooks."""
    init_default_scope(package)
    runtime = tiny.resolve_config(RUNTIME[package])
    write_images(folder)
    tiny.write_checkpoint(student, folder / 'teacher.pth')
    loader = dict(batch_size=3, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False))
    return Config(
        dict(
            default_scope=package,
            custom_imports=dict(imports=['mmdiffkd'], allow_failed_imports=False),
            model=models.distiller(student, checkpoint=folder / 'teacher.pth'),
            train_dataloader=loader,
            val_dataloader=loader,
            test_dataloader=loader,
            val_evaluator=metric,
            test_evaluator=metric,
            val_cfg=dict(type='ValLoop'),
            test_cfg=dict(type='TestLoop'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
            default_hooks=runtime.default_hooks,
            visualizer=runtime.visualizer,
            work_dir=str(folder / 'run'),
        )
    )


RUNS = dict(mmdet=detection, mmseg=segmentation, mmpretrain=classification)


def train(package, folder, shapes):
    """Train a distiller for two iterations. Return the paths of the config, the work dir and the checkpoint."""
    cfg = RUNS[package](folder, shapes)
    cfg.custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
    cfg.default_hooks.logger.interval = 1
    cfg.dump(folder / 'distill.py')
    Runner.from_cfg(Config.fromfile(folder / 'distill.py')).train()
    return SimpleNamespace(
        package=package,
        folder=folder,
        config=folder / 'distill.py',
        work_dir=folder / 'run',
        plain_config=folder / 'run' / 'student.py',
        checkpoint=folder / 'run' / 'iter_2.pth',
        image=str(next(shapes.rglob('*.png'))),
    )
