"""Students and teachers that differ in package, architecture, width, levels and strides."""

import pytest
import torch
from mmengine.registry import init_default_scope

from tests import tiny
from tests.test_upstream import models
from tests.test_upstream.models import resnet_classifier, shrunk, vit_classifier


def imagenet_convnext():
    """A classifier whose backbone returns a pooled vector, although its stages return feature maps."""
    return models.convnext_classifier()


def train(tmp_path, student, teacher, num_classes=80, size=160, **options):
    """Run a training step; return the model and the matched (student, teacher) levels of every pair."""
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, teacher, **options))
    total, _ = model.parse_losses(model.loss(*tiny.batch(model, size=size, num_classes=num_classes)))
    total.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.startswith('diffkd.')]
    assert gradients and all(gradient is not None for gradient in gradients)
    return model, {name: matches for name, (matches,) in model.matched_levels.items()}


@pytest.mark.parametrize(
    'teacher, tap, level',
    [
        (vit_classifier, 'backbone.layers.3', 2),  # returns a class token, followed by tokens of stride 16
        (imagenet_convnext, 'backbone.stages.3', 3),
        (resnet_classifier, 'backbone.layer3', 2),
    ],
)
def test_classifier_to_detector_backbone(tmp_path, teacher, tap, level):
    distill = dict(feat=dict(student='backbone', teacher=tap))
    init_default_scope('mmdet')
    model, matches = train(tmp_path, tiny.detector(), teacher(), distill=distill)
    # RetinaNet's ResNet-18 has strides 4, 8, 16 and 32
    assert matches == dict(feat=[(level, 0)])
    assert model.diffkd_teacher.model_cfg['_scope_'] == 'mmpretrain'


def test_classifier_to_segmentor_backbone(tmp_path):
    init_default_scope('mmseg')
    student = models.convnext_segmentor()
    cfg = tiny.distiller_cfg(
        tmp_path, student, imagenet_convnext(), distill=dict(feat=dict(student='backbone', teacher='backbone.stages.2'))
    )
    model = tiny.build(cfg)
    assert model.matched_levels == dict(feat=[[(2, 0)]])
    features = model.diffkd_teacher.features(torch.randn(2, 3, 64, 96))['backbone.stages.2']
    assert [tuple(feature.shape) for feature in features] == [(2, 24, 4, 6)]


def test_two_stage_teacher_and_one_stage_student(tmp_path):
    """The teacher has strides 4 to 64, the student 8 to 128. Only the common strides are compared."""
    _, matches = train(tmp_path, tiny.detector(), tiny.detector(tiny.FASTER_RCNN, base_channels=16))
    assert matches == dict(fpn=[(0, 1), (1, 2), (2, 3), (3, 4)])


def test_different_classes_width_and_levels(tmp_path):
    teacher = tiny.detector(**{'bbox_head.num_classes': 20, 'neck.out_channels': 24, 'neck.num_outs': 3})
    teacher.bbox_head.in_channels = 24
    teacher.bbox_head.anchor_generator.strides = [8, 16, 32]
    model, matches = train(tmp_path, tiny.detector(), teacher)
    assert matches == dict(fpn=[(0, 0), (1, 1), (2, 2)])
    assert [level.align.weight.shape[:2] for level in model.diffkd['fpn'].levels] == [(24, 16)] * 3


def test_logits_of_different_strides(tmp_path):
    """The logits of a dilated teacher are four times as high and as wide; those of the student are resized."""
    init_default_scope('mmseg')
    fcn = dict(
        pretrained=None,
        backbone__depth=18,
        backbone__base_channels=8,
        backbone__stem_channels=8,
        decode_head__in_channels=64,
        decode_head__channels=8,
        auxiliary_head=None,
    )
    sync_bn = dict(type='BN', requires_grad=True)
    config = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    teacher = shrunk(config, **fcn, backbone__norm_cfg=sync_bn, decode_head__norm_cfg=sync_bn)
    student = shrunk(config, **fcn, backbone__norm_cfg=sync_bn, decode_head__norm_cfg=sync_bn)
    student.backbone.update(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1))
    student.auxiliary_head = None
    teacher.auxiliary_head = None
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, teacher))
    assert list(model.pairs) == ['logits']
    outputs = model.diffkd['logits'](
        [torch.randn(2, 19, 2, 4)], model.diffkd_teacher.features(torch.randn(2, 3, 64, 128))['decode_head.conv_seg']
    )
    assert outputs[0].denoised.shape == outputs[0].teacher_latent.shape == (2, 19, 8, 16)


def test_pooled_teacher_tap_is_refused(tmp_path):
    """The neck of the classifier returns vectors; the message suggests its backbone."""
    init_default_scope('mmdet')
    cfg = tiny.distiller_cfg(tmp_path, tiny.detector(), resnet_classifier(), distill=dict(fpn=dict(tiny.FPN)))
    with pytest.raises(ValueError, match=r"maps of stride 8, .*the teacher's tap returns vectors.*teacher='backbone'"):
        tiny.build(cfg)


def test_logits_of_different_classes_are_refused(tmp_path):
    init_default_scope('mmseg')
    student, teacher = models.convnext_segmentor(), models.convnext_segmentor()
    teacher.decode_head.num_classes = teacher.auxiliary_head.num_classes = 19
    logits = dict(student='decode_head.conv_seg', teacher='decode_head.conv_seg')
    distill = dict(logits=dict(logits, neck=dict(loss_kd=dict(type='mmdiffkd.DISTLoss'))))
    with pytest.raises(
        ValueError,
        match=r'distill.logits.classes: the student has 150 classes and the teacher 19, .* are unknown: set model',
    ):
        tiny.build(tiny.distiller_cfg(tmp_path, student, teacher, distill=distill))


def test_tokens_without_a_grid_are_refused(tmp_path):
    """Deformable DETR's encoder returns the tokens of all levels in one sequence."""
    init_default_scope('mmdet')
    cfg = shrunk('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', backbone__init_cfg=None)
    distill = dict(memory=dict(student='encoder', teacher='encoder'))
    with pytest.raises(ValueError, match="'encoder' returns .* tokens, which do not form a grid"):
        tiny.build(tiny.distiller_cfg(tmp_path, cfg, cfg, distill=distill))
