"""Without ``distill``: what is compared, and a step of training with it."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils import build_for_inspection
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
    assert type(model.diffkd['logits'].levels[0].loss_kd).__name__ == 'DISTLoss'
    assert log['diffkd.logits.loss_kd'] > 0


@pytest.mark.parametrize(
    'name, logits',
    [('resnet_classifier', 'head.fc'), ('swin_classifier', 'head.fc'), ('vit_classifier', 'head.fc')],
)
def test_classifiers_by_features_and_logits(tmp_path, name, logits):
    student = getattr(models, name)()
    model, log = one_step(tmp_path, 'mmpretrain', student, student, 3)
    assert {pair: (taps.student, taps.teacher) for pair, taps in model.pairs.items()} == dict(
        feat=('backbone', 'backbone'), logits=(logits, logits)
    )
    distances = {pair: type(neck.levels[0].loss_kd).__name__ for pair, neck in model.diffkd.items()}
    assert distances == dict(feat='MSELoss', logits='KLDivergence')
    assert log['diffkd.feat.loss_kd'] > 0 and log['diffkd.logits.loss_kd'] > 0


def default(student, teacher, preset='diffkd'):
    return PRESETS.build(dict(type=preset)).default_pairs(build_for_inspection(student), student, teacher)


def test_plus_adds_what_the_dense_head_says(tmp_path):
    init_default_scope('mmdet')
    model = tiny.build(tiny.distiller_cfg(tmp_path, preset='plus'))
    assert {name: pair.student for name, pair in model.pairs.items()} == dict(
        fpn='neck', cls='bbox_head.retina_cls', reg='bbox_head.retina_reg'
    )
    losses = model.loss(*tiny.batch(model))
    total, log = model.parse_losses(losses)
    total.backward()
    assert log['diffkd.cls.loss_kd'] > 0 and log['diffkd.reg.loss_kd'] > 0
    assert [level.num_grad_steps for level in model.diffkd['fpn'].levels] == [1] * 5


def test_plus_leaves_out_heads_that_differ():
    teacher = tiny.detector()
    teacher.bbox_head.anchor_generator.octave_base_scale = 2
    assert list(default(tiny.detector(), teacher, preset='plus')) == ['fpn']
    teacher = tiny.detector()
    teacher.bbox_head.num_classes = 20
    assert list(default(tiny.detector(), teacher, preset='plus')) == ['fpn', 'reg']
    teacher = tiny.detector()
    teacher.bbox_head.bbox_coder.target_stds = [0.1, 0.1, 0.2, 0.2]
    assert list(default(tiny.detector(), teacher, preset='plus')) == ['fpn', 'cls']


def test_plus_leaves_out_boxes_that_are_scaled_after_their_layer():
    """Of FCOS, ATSS and GFL: the layers of two models need not agree where their boxes do."""
    fcos = tiny.detector('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', bbox_head=dict(norm_cfg=dict(type='BN')))
    assert list(default(fcos, fcos, preset='plus')) == ['fpn', 'cls']


def test_plus_compares_segmentors_by_their_last_feature_map(tmp_path):
    student = models.convnext_segmentor()
    init_default_scope('mmseg')
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, student, preset='plus'))
    assert list(model.pairs) == ['feat']
    assert model.matched_levels['feat'] == [[(3, 3)]]
    assert model.diffkd['feat'].levels[0].num_grad_steps == 1


def test_plus_takes_the_rpn_of_detectors_with_regions():
    faster_rcnn = tiny.detector(tiny.FASTER_RCNN)
    pairs = default(faster_rcnn, faster_rcnn, preset='plus')
    assert [pair['student'] for pair in pairs.values()] == ['neck', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg']


def test_other_classes_leave_the_logits_out():
    assert list(default(models.resnet_classifier(3), models.resnet_classifier(5))) == ['feat']
    segmentor = models.convnext_segmentor()
    other = copy.deepcopy(segmentor)
    other.decode_head.num_classes = 19
    assert default(segmentor, other) == dict(feat=dict(student='backbone', teacher='backbone', neck={}))


@pytest.mark.parametrize('name, stages', [('resnet_classifier', 4), ('swin_classifier', 3)])
def test_a_frozen_backbone_leaves_its_features_out(name, stages):
    """Linear probes, and what is fine-tuned behind a frozen backbone; Swin freezes when it is told to train."""
    student, teacher = getattr(models, name)(), getattr(models, name)()
    student.backbone.frozen_stages = stages
    assert list(MODELS.build(models.distiller(student, teacher)).pairs) == ['logits']
    teacher.head.num_classes = 5
    with pytest.raises(ValueError, match='distill.feat: no gradient reaches the student through its tap; it is frozen'):
        MODELS.build(models.distiller(student, teacher))


def test_logits_of_independent_labels_are_left_out():
    student = models.resnet_classifier(4)
    student.head = dict(type='MultiLabelLinearClsHead', num_classes=4, in_channels=64)
    assert list(default(student, student)) == ['feat']


def test_the_last_of_stacked_layers_has_the_logits():
    student = models.resnet_classifier(8)
    student.head = dict(type='StackedLinearClsHead', num_classes=8, in_channels=64, mid_channels=[8])
    assert default(student, student)['logits']['student'] == 'head.layers.1.fc'


def test_binary_segmentors_by_their_features():
    """One channel of logits is no distribution over classes."""
    student = models.convnext_segmentor()
    student.decode_head.update(
        num_classes=2, out_channels=1, loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=True)
    )
    assert list(default(student, student)) == ['feat']


def test_the_papers_autoencoder_for_classifiers():
    assert default(*[models.resnet_classifier()] * 2)['feat']['neck']['latent_channels'] == 1024


def test_detectors_without_a_neck():
    student = tiny.detector()
    student.neck = None
    assert default(student, tiny.detector()) == dict(fpn=dict(student='backbone', teacher='neck', neck={}))


def test_different_tasks_have_no_default():
    with pytest.raises(ValueError, match='no default tap for the student RetinaNet and the teacher ImageClassifier'):
        default(tiny.detector(), models.resnet_classifier())
