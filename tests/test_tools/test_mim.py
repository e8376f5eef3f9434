"""Run the documented mim commands on a shipped config of each codebase, with a few tiny images."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cv2
import mmdet
import numpy as np
import pytest
from mim.utils import get_installed_path, is_installed, module_full_name
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdiffkd.utils import get_model_cfg, resolve_config
from tests import tiny
from tests.conftest import ROOT

LOADERS = [f'{split}_dataloader' for split in ('train', 'val', 'test')]


def detection():
    """Return the name by which mim knows mmdet without an alias. The name depends on the package family."""
    try:
        return version('onedl-mmdetection') and 'mmdetection'
    except PackageNotFoundError:
        return 'mmdet'


def mim(command, codebase, *args):
    """Run a mim command and return its output."""
    assert is_installed(module_full_name(codebase)), f'mim would install {codebase}: run make env'
    command = [Path(sys.executable).parent / 'mim', command, codebase, *args]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def mim_train(codebase, config, folder, *options):
    """Run ``mim train`` on a few images, with a teacher of random weights, and return the records of its log."""
    cfg = Config.fromfile(ROOT / config)
    init_default_scope(cfg.default_scope)
    teacher = resolve_config(cfg.model.teacher.config)
    options += (
        *(f'{loader}.{key}' for loader in LOADERS for key in ('num_workers=0', 'persistent_workers=False')),
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
        'model.student.backbone.init_cfg=None',
        f'model.teacher.checkpoint={tiny.write_checkpoint(get_model_cfg(teacher), folder / "teacher.pth")}',
    )
    done = mim('train', codebase, config, '--gpus', 0, '--work-dir', folder / 'run', '--cfg-options', *options)
    assert 'Training finished successfully' in done
    assert 'teacher' not in Config.fromfile(folder / 'run' / 'student.py').model
    (log,) = (folder / 'run').glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def write_image(path, high, shape):
    """Write an image of random values below ``high``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(high, size=shape, dtype=np.uint8))


def test_detection(tmp_path, shapes):
    options = []
    for loader, split in zip(LOADERS, ('train', 'val', 'val')):
        options += [
            f'{loader}.dataset.data_root={shapes}/',
            f'{loader}.dataset.ann_file=annotations/{split}.json',
            f'{loader}.dataset.data_prefix.img=images/{split}/',
            f'{loader}.dataset.indices=2',
        ]
    records = mim_train(
        'mmdet',
        'configs/diffkd_retinanet_r101_r50.py',
        tmp_path,
        *options,
        f'val_evaluator.ann_file={shapes}/annotations/val.json',
        f'test_evaluator.ann_file={shapes}/annotations/val.json',
        'train_dataloader.dataset.pipeline.2.scale=(160,160)',
        'val_dataloader.dataset.pipeline.1.scale=(160,160)',
        'train_cfg.max_epochs=1',
        'model.student.test_cfg.score_thr=0.0',
    )
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.gamma.4', 'diffkd.reg.loss_kd'} <= set(records[0])
    assert 'coco/bbox_mAP' in records[-1]
    run = tmp_path / 'run'
    tested = mim(
        'test', 'mmdet', run / 'diffkd_retinanet_r101_r50.py', '--checkpoint', run / 'epoch_1.pth', '--gpus', 0
    )
    assert 'Testing finished successfully' in tested
    assert f'coco/bbox_mAP: {records[-1]["coco/bbox_mAP"]:.4f}' in tested


def test_names_of_mmdet():
    """Under both names, ``mmdet`` and the name of the package family, mim finds the same folder."""
    folder = Path(mmdet.__file__).parent
    assert {Path(get_installed_path(module_full_name(name))) for name in ('mmdet', detection())} == {folder}


@pytest.mark.slow
def test_segmentation(tmp_path):
    for split in ('train', 'val'):
        for index in range(2):
            write_image(tmp_path / 'data' / 'img_dir' / split / f'{index}.jpg', 256, (180, 240, 3))
            write_image(tmp_path / 'data' / 'ann_dir' / split / f'{index}.png', 11, (180, 240))
    records = mim_train(
        'mmsegmentation',
        'configs/camvid/diffkd_deeplabv3-r18-half_deeplabv3-r18-quarter_1500i_camvid.py',
        tmp_path,
        *(f'{loader}.dataset.data_root={tmp_path}/data/' for loader in LOADERS),
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
    )
    assert 'diffkd.logits.loss_kd' in records[0]
    assert 'mIoU' in records[-1]


@pytest.mark.slow
def test_classification(tmp_path):
    config = 'configs/shape_classes/diffkd_resnet18-half_resnet18-eighth_12e_shape-classes.py'
    for split in ('train', 'val'):
        for name in Config.fromfile(ROOT / config).metainfo.classes:
            write_image(tmp_path / 'data' / split / name / '0.jpg', 256, (64, 64, 3))
    records = mim_train(
        'mmpretrain',
        config,
        tmp_path,
        *(f'{loader}.dataset.data_root={tmp_path}/data/' for loader in LOADERS),
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
    )
    assert {'diffkd.feat.loss_kd', 'diffkd.logits.loss_kd'} <= set(records[0])
    assert 'accuracy/top1' in records[-1]
