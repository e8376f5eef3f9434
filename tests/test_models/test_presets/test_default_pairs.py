"""Check the default pairs of every task, and train a step with them."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils import build_for_inspection
from tests import tiny
from tests.test_upstream import models

SIZE = 224  # the smallest size for Swin's windows


def labels(scope, num_classes):
    """Return the data samples of two images."""
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
    no_gradient = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in no_gradient if name.startswith('diffkd.')], no_gradient
    assert total.isfinite()
    return model, log_vars


def test_segmentors_distill_logits(tmp_path):
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
def test_classifiers_distill_features_and_logits(tmp_path, name, logits):
    student = getattr(models, name)()
    model, log = one_step(tmp_path, 'mmpretrain', student, student, 3)
    assert {pair: (taps.student, taps.teacher) for pair, taps in model.pairs.items()} == dict(
        feat=('backbone', 'backbone'), logits=(logits, logits)
    )
    distances = {pair: type(neck.levels[0].loss_kd).__name__ for pair, neck in model.diffkd.items()}
    assert distances == dict(feat='MSELoss', logits='KLDivergence')
    assert log['diffkd.feat.loss_kd'] > 0 and log['diffkd.logits.loss_kd'] > 0


def default_pairs(student, teacher, preset='diffkd'):
    return PRESETS.build(dict(type=preset)).default_pairs(build_for_inspection(student), student, teacher)


def test_plus_adds_the_outputs_of_the_dense_head(tmp_path):
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


def test_plus_leaves_out_outputs_that_differ():
    teacher = tiny.detector()
    teacher.bbox_head.anchor_generator.octave_base_scale = 2
    assert list(default_pairs(tiny.detector(), teacher, preset='plus')) == ['fpn']
    teacher = tiny.detector()
    teacher.bbox_head.num_classes = 20
    assert list(default_pairs(tiny.detector(), teacher, preset='plus')) == ['fpn', 'reg']
    teacher = tiny.detector()
    teacher.bbox_head.bbox_coder.target_stds = [0.1, 0.1, 0.2, 0.2]
    assert list(default_pairs(tiny.detector(), teacher, preset='plus')) == ['fpn', 'cls']


def test_plus_leaves_out_scaled_regression():
    """FCOS, ATSS and GFL scale the outputs of the layer, so equal boxes do not need equal outputs."""
    fcos = tiny.detector('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', bbox_head=dict(norm_cfg=dict(type='BN')))
    assert list(default_pairs(fcos, fcos, preset='plus')) == ['fpn', 'cls']


def test_plus_distills_the_last_feature_map_of_segmentors(tmp_path):
    student = models.convnext_segmentor()
    init_default_scope('mmseg')
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, student, preset='plus'))
    assert list(model.pairs) == ['feat']
    assert model.matched_levels['feat'] == [[(3, 3)]]
    assert model.diffkd['feat'].levels[0].num_grad_steps == 1


def test_plus_distills_the_rpn_of_two_stage_detectors():
    faster_rcnn = tiny.detector(tiny.FASTER_RCNN)
    pairs = default_pairs(faster_rcnn, faster_rcnn, preset='plus')
    assert [pair['student'] for pair in pairs.values()] == ['neck', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg']


def test_logits_of_different_classes_are_left_out():
    assert list(default_pairs(models.resnet_classifier(3), models.resnet_classifier(5))) == ['feat']
    segmentor = models.convnext_segmentor()
    other = copy.deepcopy(segmentor)
    other.decode_head.num_classes = 19
    assert default_pairs(segmentor, other) == dict(feat=dict(student='backbone', teacher='backbone', neck={}))


@pytest.mark.parametrize('name, stages', [('resnet_classifier', 4), ('swin_classifier', 3)])
def test_features_of_a_frozen_backbone_are_left_out(name, stages):
    """Linear probing, for example, freezes the backbone. Swin freezes its stages only in ``train()``."""
    student, teacher = getattr(models, name)(), getattr(models, name)()
    student.backbone.frozen_stages = stages
    assert list(MODELS.build(models.distiller(student, teacher)).pairs) == ['logits']
    teacher.head.num_classes = 5
    with pytest.raises(
        ValueError, match='distill.feat: no gradient reaches the student through its tap. Either the tap'
    ):
        MODELS.build(models.distiller(student, teacher))


def test_multi_label_logits_are_left_out():
    student = models.resnet_classifier(4)
    student.head = dict(type='MultiLabelLinearClsHead', num_classes=4, in_channels=64)
    assert list(default_pairs(student, student)) == ['feat']


def test_stacked_head_is_tapped_at_its_last_layer():
    student = models.resnet_classifier(8)
    student.head = dict(type='StackedLinearClsHead', num_classes=8, in_channels=64, mid_channels=[8])
    assert default_pairs(student, student)['logits']['student'] == 'head.layers.1.fc'


def test_binary_segmentors_distill_features():
    """A single logit channel is not a distribution over classes."""
    student = models.convnext_segmentor()
    student.decode_head.update(
        num_classes=2, out_channels=1, loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=True)
    )
    assert list(default_pairs(student, student)) == ['feat']


def test_autoencoder_of_classifiers_has_the_papers_width():
    assert default_pairs(*[models.resnet_classifier()] * 2)['feat']['neck']['latent_channels'] == 1024


def test_detectors_without_a_neck():
    student = tiny.detector()
    student.neck = None
    assert default_pairs(student, tiny.detector()) == dict(fpn=dict(student='backbone', teacher='neck', neck={}))


def test_different_tasks_have_no_default():
    with pytest.raises(ValueError, match='no default tap for the student RetinaNet and the teacher ImageClassifier'):
        default_pairs(tiny.detector(), models.resnet_classifier())
