"""If a recipe changes during training, the student changes, and distillation continues."""

import pytest
from mmengine.runner import Runner

from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny
from tests.conftest import logged
from tests.test_upstream import models

YOLOX = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
RTMDET = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
SHRINK_FACTOR = 640 // tiny.SIZE


def thin(config, widen_factor):
    """Return a thin model of the package. Its backbone has 64 * ``widen_factor`` channels at stride 2."""
    cfg = resolve_config(config)
    channels = [int(width * widen_factor) for width in (256, 512, 1024)]
    cfg.merge_from_dict(
        {
            'model.backbone.deepen_factor': 0.1,
            'model.backbone.widen_factor': widen_factor,
            'model.backbone.init_cfg': None,
            'model.neck.in_channels': channels,
            'model.neck.out_channels': channels[0],
            'model.bbox_head.in_channels': channels[0],
            'model.bbox_head.feat_channels': channels[0],
            'model.bbox_head.stacked_convs': 1,
        }
    )
    return get_model_cfg(cfg)


def smaller(pipeline):
    """Divide all sizes in the transforms by ``SHRINK_FACTOR``."""
    sizes = ('img_scale', 'scale', 'crop_size', 'size', 'border')
    for transform in pipeline:
        for key in sizes:
            if key in transform:
                transform[key] = tuple(int(side / SHRINK_FACTOR) for side in transform[key])
    return pipeline


@pytest.fixture
def run(tmp_path, shapes):
    """Return a function that builds three epochs of a recipe on the shapes, distilled from a wider teacher."""

    def build(config, change):
        cfg = tiny.unformatted(resolve_config(config))
        student, teacher = thin(config, 0.125), thin(config, 0.25)
        change(cfg, student)
        checkpoint = tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth', seed=1)
        cfg.model = models.distiller(student, teacher, checkpoint)
        dataset = cfg.train_dataloader.dataset
        smaller(dataset.pipeline)
        dataset.get('dataset', dataset).update(
            data_root=f'{shapes}/', ann_file='annotations/train.json', data_prefix=dict(img='images/train/')
        )
        cfg.train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
        cfg.merge_from_dict(
            {
                'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3),
                'default_hooks.logger.interval': 1,
                'param_scheduler': [],
                'work_dir': str(tmp_path / 'run'),
                'randomness': dict(seed=0),
            }
        )
        for key in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'val_{key}'] = cfg[f'test_{key}'] = None
        return Runner.from_cfg(cfg)

    return build


def epochs(folder):
    """Return the logged records of each epoch."""
    records = logged(folder)
    return [[record for record in records if record['epoch'] == epoch] for epoch in (1, 2, 3)]


def assert_distilled(record):
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.loss_diffusion', 'diffkd.fpn.gamma.2'} <= set(record)
    summed = sum(value for name, value in record.items() if 'loss' in name and name != 'loss')
    assert record['loss'] == pytest.approx(summed, rel=1e-4)


def test_yolox(run, tmp_path):
    def change(cfg, student):
        (resize,) = student.data_preprocessor.batch_augments
        assert resize.type == 'BatchSyncRandomResize'
        resize.update(random_size_range=(96, 160), interval=1)
        (mode_switch,) = [hook for hook in cfg.custom_hooks if hook.type == 'YOLOXModeSwitchHook']
        mode_switch.num_last_epochs = 1
        # the recipe of YOLOX-tiny does not use MixUp, so add it
        pipeline = cfg.train_dataloader.dataset.pipeline
        pipeline.insert(2, dict(type='MixUp', img_scale=(640, 640), ratio_range=(0.8, 1.6), pad_val=114.0))

    runner, sizes = run(YOLOX, change), set()
    runner.model.backbone.register_forward_hook(lambda module, inputs, outputs: sizes.add(inputs[0].shape[-2:]))
    runner.train()
    assert runner.model.bbox_head.use_l1 is True
    assert runner.model.diffkd_teacher.model.bbox_head.use_l1 is False
    assert len(sizes) > 1
    dataset = runner.train_dataloader.dataset
    assert type(dataset).__name__ == 'MultiImageMixDataset'
    assert set(dataset.pipeline_types) & set(dataset._skip_type_keys) == {'Mosaic', 'RandomAffine', 'MixUp'}
    before, *after = epochs(tmp_path / 'run')
    assert [len(epoch) for epoch in (before, *after)] == [2, 2, 2]
    for record in before:
        assert_distilled(record)
        assert 'loss_l1' not in record
    for record in after[0] + after[1]:  # the hook counts epochs from one, so it switches one epoch early
        assert_distilled(record)
        assert record['loss_l1'] > 0
    (ema,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
    assert ema.ema_model.module.diffkd_teacher is runner.model.diffkd_teacher


def test_rtmdet(run, tmp_path):
    def change(cfg, student):
        (switch,) = [hook for hook in cfg.custom_hooks if hook.type == 'PipelineSwitchHook']
        switch.switch_epoch = 1
        smaller(switch.switch_pipeline)

    runner = run(RTMDET, change)
    runner.train()
    transforms = [type(transform).__name__ for transform in runner.train_dataloader.dataset.pipeline.transforms]
    assert 'RandomCrop' in transforms and not {'CachedMosaic', 'CachedMixUp'} & set(transforms)
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert log.index('Epoch(train) [1][2/2]') < log.index('Switch pipeline now!') < log.index('Epoch(train) [2][1/2]')
    for epoch in epochs(tmp_path / 'run'):
        assert len(epoch) == 2
        for record in epoch:
            assert_distilled(record)
