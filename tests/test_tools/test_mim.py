"""The documented commands of mim, on the documented config, with the full R101 and R50."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdiffkd.utils import model_of, resolve_config
from tests import tiny
from tests.conftest import ROOT

CONFIG = ROOT / 'configs' / 'diffkd_retinanet_r101_r50.py'


def codebase():
    """What mim calls mmdet: the two families of packages differ."""
    try:
        return version('onedl-mmdetection') and 'mmdetection'
    except PackageNotFoundError:
        return 'mmdet'


@pytest.mark.slow
def test_mim_train(tmp_path, shapes):
    teacher = resolve_config(Config.fromfile(CONFIG).model.teacher.config)
    checkpoint = tiny.write_checkpoint(model_of(teacher), tmp_path / 'teacher.pth')
    loaders = [f'{split}_dataloader' for split in ('train', 'val', 'test')]
    options = [f'{loader}.dataset.data_root={shapes}/' for loader in loaders]
    options += [f'{loader}.{key}' for loader in loaders for key in ('num_workers=0', 'persistent_workers=False')]
    for loader, split in zip(loaders, ('train', 'val', 'val')):
        options += [
            f'{loader}.dataset.ann_file=annotations/{split}.json',
            f'{loader}.dataset.data_prefix.img=images/{split}/',
            f'{loader}.dataset.indices=2',
        ]
    options += [
        f'val_evaluator.ann_file={shapes}/annotations/val.json',
        f'test_evaluator.ann_file={shapes}/annotations/val.json',
        'train_dataloader.dataset.pipeline.2.scale=(160,160)',
        'val_dataloader.dataset.pipeline.1.scale=(160,160)',
        'train_dataloader.batch_size=1',
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        'model.student.backbone.init_cfg=None',
        'model.student.test_cfg.score_thr=0.0',
        f'model.teacher.checkpoint={checkpoint}',
    ]
    mim = Path(sys.executable).parent / 'mim'
    command = [mim, 'train', codebase(), 'configs/diffkd_retinanet_r101_r50.py', '--gpus', '0']
    command += ['--work-dir', tmp_path / 'run', '--cfg-options', *options]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'Training finished successfully' in done.stdout
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.gamma.4', 'diffkd.reg.loss_kd'} <= set(records[0])
    assert 'coco/bbox_mAP' in records[-1]
