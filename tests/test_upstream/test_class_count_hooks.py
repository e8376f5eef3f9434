"""Hooks that check the number of classes check only the student; the teacher may have different classes."""

import cv2
import numpy as np
import pytest
from mmengine.runner import Runner

from mmdiffkd.utils import resolve_config
from tests import tiny
from tests.test_upstream import models

MMDET_HOOK = [dict(type='NumClassCheckHook')]
MMPRETRAIN_HOOK = [dict(type='mmpretrain.ClassNumCheckHook')]
CLASSES = ('circle', 'square', 'star')


def detector(num_classes):
    return tiny.detector(**{'bbox_head.num_classes': num_classes})


def test_detection_teacher_with_different_classes(runner, tmp_path):
    run = runner(
        tiny.distiller_cfg(tmp_path, teacher=detector(7)), max_iters=1, val_interval=1, custom_hooks=MMDET_HOOK
    )
    run.train()
    assert run.model.bbox_head.num_classes == len(run.train_dataloader.dataset.metainfo['classes']) == 80
    assert run.model.diffkd_teacher.model.bbox_head.num_classes == 7
    assert {'train/loss_cls', 'train/diffkd.fpn.loss_kd'} <= set(run.message_hub.log_scalars)
    assert run.record.validated is not None  # the hook also checked the validation set


@pytest.mark.parametrize('num_classes', [7, 81])
@pytest.mark.parametrize('distilled', [True, False])
def test_detection_student_with_different_classes(runner, tmp_path, num_classes, distilled):
    student = detector(num_classes)
    # the teacher has the classes of the data set and is not checked
    cfg = tiny.distiller_cfg(tmp_path, student=student) if distilled else student
    run = runner(cfg, max_iters=1, custom_hooks=MMDET_HOOK)
    with pytest.raises(
        AssertionError, match=rf'`num_classes` \({num_classes}\) in RetinaHead of .*\s+80\) in CocoDataset'
    ):
        run.train()
    assert not run.record.weights


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Four noisy pictures per class, one folder per class."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for index in range(4):
            picture = rng.integers(0, 80, (64, 64, 3)) + 60 * label
            cv2.imwrite(str(root / name / f'{index}.png'), picture.astype(np.uint8))
    return root


@pytest.fixture
def classification(tmp_path, pictures):
    """Return a function that builds one epoch of upstream's ResNet-18 recipe on the pictures."""
    checkpoint = tiny.write_checkpoint(
        models.resnet_classifier(num_classes=5, base_channels=16), tmp_path / 'teacher.pth'
    )

    def build(num_classes, distilled=True):
        cfg = tiny.unformatted(resolve_config('mmpretrain::resnet/resnet18_8xb32_in1k.py'))
        cfg.model = models.resnet_classifier(num_classes)
        cfg.model.data_preprocessor.num_classes = len(CLASSES)  # the hook also checks these
        if distilled:
            teacher = models.resnet_classifier(num_classes=5, base_channels=16)
            cfg.model = models.distiller(cfg.model, teacher, checkpoint, distill=models.BACKBONES)
        dataset = dict(_delete_=True, type='CustomDataset', data_root=str(pictures), classes=CLASSES)
        for split in ('train', 'val'):
            resize = dict(type='Resize', scale=64)
            pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='PackInputs')]
            loader = dict(batch_size=4, num_workers=0, persistent_workers=False)
            loader['dataset'] = dict(dataset, pipeline=pipeline)
            cfg.merge_from_dict({f'{split}_dataloader': loader})
        cfg.merge_from_dict(
            dict(
                train_cfg=dict(max_epochs=1),
                val_evaluator=dict(topk=(1,)),
                test_dataloader=None,
                test_cfg=None,
                test_evaluator=None,
                custom_hooks=MMPRETRAIN_HOOK,
                work_dir=str(tmp_path / 'run'),
            )
        )
        return Runner.from_cfg(cfg)

    return build


def test_classification_teacher_with_different_classes(classification):
    run = classification(num_classes=3)
    run.train()
    assert run.model.head.num_classes == len(run.train_dataloader.dataset.CLASSES) == 3
    assert run.model.diffkd_teacher.model.head.num_classes == 5
    assert {'train/loss', 'train/diffkd.feat.loss_kd'} <= set(run.message_hub.log_scalars)
    assert 'val/accuracy/top1' in run.message_hub.log_scalars


@pytest.mark.parametrize('num_classes', [2, 5])
@pytest.mark.parametrize('distilled', [True, False])
def test_classification_student_with_different_classes(classification, num_classes, distilled):
    run = classification(num_classes, distilled)
    with pytest.raises(
        AssertionError, match=rf'`num_classes` \({num_classes}\) in LinearClsHead of .*\s+3\) in CustomDataset'
    ):
        run.train()
    assert run.iter == 0
