"""Data sets that wrap other data sets: training, testing, test-time augmentation and the preview."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmdiffkd.apis import distill, preview
from mmdiffkd.utils import get_model_cfg, resolve_config
from mmdiffkd.utils.dummy_inputs import random_batch
from mmdiffkd.utils.image_settings import image_size, nested_datasets
from tests import tiny
from tests.conftest import call_tool
from tests.test_tools.test_life_cycle import TTA, map_of_test


@pytest.fixture
def weights(tmp_path):
    init_default_scope('mmdet')
    cfg = tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)
    torch.save(dict(state_dict=MODELS.build(cfg).state_dict(), meta=dict()), tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


def write_config(folder, shapes, wrap):
    """Write a config whose test set is wrapped, and a config with test-time augmentation."""
    cfg = tiny.run_cfg(
        tiny.distiller_cfg(folder, distill=tiny.LIGHT),
        shapes,
        folder / 'run',
        custom_imports=dict(imports=['mmdiffkd']),
    )
    cfg.pop('experiment_name')
    cfg.test_dataloader.dataset = wrap(cfg.test_dataloader.dataset)
    cfg.dump(folder / 'config.py')
    (folder / 'augmented.py').write_text(TTA)
    return folder / 'augmented.py'


@pytest.mark.situation(
    'places',
    'Test-time augmentation on wrapped data sets',
    'mmdetection #9491, mmdetection #11828',
    '`test.py --tta` replaces the pipeline of every data set in wrappers such as `ConcatDataset` and `RepeatDataset`.',
)
def test_augmentation(tmp_path, shapes, weights):
    def wrap(dataset):
        half = dict(dataset, indices=2)
        return dict(type='ConcatDataset', datasets=[half, dict(type='RepeatDataset', times=1, dataset=half)])

    config = write_config(tmp_path, shapes, wrap)
    call_tool('test.py', config, weights, '--work-dir', tmp_path / 'tested', '--tta')
    assert map_of_test(tmp_path / 'tested') >= 0


def test_augmentation_of_mixed_images(tmp_path, shapes, weights):
    def wrap(dataset):
        return dict(type='MultiImageMixDataset', dataset=dataset, pipeline=[dict(type='RandomFlip', prob=0.0)])

    config = write_config(tmp_path, shapes, wrap)
    done = call_tool('test.py', config, weights, '--work-dir', tmp_path / 'tested', '--tta', check=False)
    assert done.returncode != 0 and '--tta does not work with a MultiImageMixDataset' in done.stdout


PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 48)), dict(type='PackInputs')]
SOURCE = dict(type='CustomDataset', pipeline=PIPELINE)
WRAPPED = [
    SOURCE,
    dict(type='RepeatDataset', times=2, dataset=SOURCE),
    dict(type='ConcatDataset', datasets=[SOURCE, SOURCE]),
    dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[SOURCE])),
    dict(type='KFoldDataset', fold=0, num_splits=2, test_mode=False, dataset=SOURCE),
    dict(type='ClassBalancedDataset', oversample_thr=0.1, dataset=dict(type='KFoldDataset', fold=0, dataset=SOURCE)),
    dict(type='MultiImageMixDataset', dataset=dict(SOURCE, pipeline=PIPELINE[:1]), pipeline=PIPELINE[1:]),
]


@pytest.mark.parametrize('dataset', WRAPPED)
def test_pipeline_of_the_innermost_dataset(dataset):
    cfg = resolve_config('mmpretrain::resnet/resnet18_8xb32_in1k.py')
    cfg.train_dataloader.dataset = dataset
    assert image_size(cfg) == (48, 64)
    batch = random_batch(cfg, 32)
    assert batch['inputs'].shape == (2, 3, 48, 64)  # one tensor, as mmpretrain's default_collate makes it
    assert len(list(nested_datasets(dataset))) >= 1


@pytest.mark.situation(
    'places',
    'Folds and repetitions of a data set',
    'mmdetection #12410',
    'Training and `tools/test.py` work as without distillation, and the preview also accepts such data sets.',
)
def test_folds(tmp_path):
    for name in '01':
        for index in range(2):
            image = np.random.default_rng(index).integers(256, size=(64, 64, 3), dtype=np.uint8)
            file = tmp_path / 'images' / name / f'{index}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), image)
    init_default_scope('mmpretrain')
    cfg = resolve_config('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
    cfg.merge_from_dict({'model.backbone.base_channels': 8, 'model.backbone.stem_channels': 8})
    cfg.model.head.update(in_channels=64, num_classes=2, topk=(1,))
    fold = dict(type='KFoldDataset', fold=0, num_splits=2, test_mode=False, seed=1)
    fold['dataset'] = dict(SOURCE, data_root=str(tmp_path / 'images'))
    run = Config(
        dict(
            default_scope='mmpretrain',
            model=get_model_cfg(cfg),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                dataset=dict(type='RepeatDataset', times=2, dataset=fold),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        )
    )
    checkpoint = tiny.write_checkpoint(run.model, tmp_path / 'teacher.pth')
    teacher = Config(dict(model=run.model.to_dict(), default_scope='mmpretrain'))
    result = distill(run, teacher, checkpoint, work_dir=str(tmp_path / 'run'))
    assert result['checkpoint'].endswith('epoch_1.pth')
    assert preview(result['config'])['size'] == [48, 64]
