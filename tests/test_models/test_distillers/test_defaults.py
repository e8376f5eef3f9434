"""Without ``distill``: what is compared, and a step of training with it."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData

from mmdiffkd.models.distillers.defaults import default_distill
from tests import tiny
from tests.test_upstream import models

SIZE = 224  # Swin's windows take no less


def labels(scope, num_classes):
    """Data samples of two images."""
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(metainfo=dict(img_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE))) for _ in range(2)]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(num_classes, (1, SIZE, SIZE)))
        return samples
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(index) for index in range(2)]


def one_step(tmp_path, scope, student, teacher, num_classes):
    init_default_scope(scope)
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, teacher))
    losses = model.loss(torch.randn(2, 3, SIZE, SIZE), labels(scope, num_classes))
    total, log_vars = model.parse_losses(losses)
    total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in without if name.startswith('diffkd.')], without
    assert total.isfinite()
    return model, log_vars


def test_segmentors_by_their_logits(tmp_path):
    student = models.convnext_segmentor()
    model, log = one_step(tmp_path, 'mmseg', student, student, 150)
    assert list(model.pairs) == ['logits']
    assert model.pairs['logits'].student == model.pairs['logits'].teacher == 'decode_head.conv_seg'
    assert type(model.diffkd['logits'].levels[0].distance).__name__ == 'DISTLoss'
    assert log['diffkd.logits.loss_kd'] > 0


@pytest.mark.parametrize('name', ['resnet_classifier', 'swin_classifier', 'vit_classifier'])
def test_classifiers_by_features_and_logits(tmp_path, name):
    student = getattr(models, name)()
    student.pop('train_cfg', None)  # no batch augmentation
    student.pop('data_preprocessor', None)
    model, log = one_step(tmp_path, 'mmpretrain', student, student, 3)
    assert {pair: (taps.student, taps.teacher) for pair, taps in model.pairs.items()} == dict(
        feat=('backbone', 'backbone'), logits=('head.fc', 'head.fc')
    )
    assert log['diffkd.feat.loss_kd'] > 0 and log['diffkd.logits.loss_kd'] > 0


def test_other_classes_leave_the_logits_out(tmp_path):
    pairs = default_distill(models.resnet_classifier(3), models.resnet_classifier(5))
    assert list(pairs) == ['feat']


def test_detectors_without_a_neck():
    student = tiny.detector()
    student.neck = None
    assert default_distill(student, tiny.detector()) == dict(fpn=dict(student='backbone', teacher='neck'))


def test_different_tasks_have_no_default():
    with pytest.raises(ValueError, match='no default tap for the student RetinaNet and the teacher ImageClassifier'):
        default_distill(tiny.detector(), models.resnet_classifier())
