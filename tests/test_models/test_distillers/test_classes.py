"""Teachers with other classes: the classes that student and teacher share are compared."""

import re

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

from mmdiffkd.apis import preview
from mmdiffkd.models import ChannelWiseDivergence, DistillContext, DKDLoss
from mmdiffkd.models.distillers.classes import ClassMatcher, dataset_classes, find_class_layer
from mmdiffkd.utils import build_for_inspection, resolve_config
from tests import tiny
from tests.conftest import call_tool
from tests.test_upstream import models

COCO = resolve_config(tiny.RETINANET)
SHAPES = ('stop sign', 'sports ball', 'kite', 'pizza', 'donut')  # classes of the fixture shapes, all of COCO
PLAIN = dict(denoise=False, align=False)
CWD = dict(type='mmdiffkd.ChannelWiseDivergence')
ONE_LAYER = {'bbox_head.stacked_convs': 1}


def whole(model_cfg, config=tiny.RETINANET, **settings):
    """Return a whole config, with the data sets of ``config``, as a teacher's file has."""
    return {**resolve_config(config).to_dict(), 'model': model_cfg, **settings}


def detector(num_classes, base_channels=8, **changes):
    return tiny.detector(base_channels=base_channels, **{'bbox_head.num_classes': num_classes, **ONE_LAYER, **changes})


def pair_on(path, loss_kd, **fields):
    return dict(student=path, teacher=path, neck=dict(PLAIN, loss_kd=dict(type=f'mmdiffkd.{loss_kd}')), **fields)


def classifier_pair(student, teacher, loss_kd='KLDivergence', **fields):
    """Build the distiller of two classifiers with these names of classes."""
    return MODELS.build(
        ConfigDict(
            type='mmdiffkd.DiffKDDistiller',
            student=models.resnet_classifier(len(student)),
            teacher=dict(config=models.resnet_classifier(len(teacher)), metainfo=dict(classes=list(teacher))),
            distill=dict(logits=pair_on('head.fc', loss_kd, **fields)),
            metainfo=dict(classes=list(student)),
        )
    )


@pytest.mark.parametrize(
    'student, teacher, mapping, shared',
    [
        (('cat', 'dog', 'emu'), ('dog', 'ant', 'cat'), None, [(0, 2), (1, 0)]),
        (('Traffic_Light', 'cat'), ('cat', 'traffic light'), None, [(0, 1), (1, 0)]),  # equal numbers, other order
        (('cat', 'pup'), ('dog', 'ant', 'cat'), {'pup': 'dog'}, [(0, 2), (1, 0)]),
        (('cat', 'dog'), ('dog', 'ant', 'cat'), {'cat': None, 'dog': 1}, [(1, 1)]),
        (('cat', 'dog'), None, {0: 3, '1': 0}, [(0, 3), (1, 0)]),  # a dumped config has text as keys
        (('cat', 'dog'), ('cat', 'dog'), None, None),
        (('crane', 'crane', 'ox'), ('crane', 'crane', 'ox'), None, None),  # ImageNet has a bird and a machine
        (('crane', 'crane'), ('ox', 'crane', 'crane'), None, [(0, 1), (1, 2)]),
        (None, None, None, None),
    ],
)
def test_match(student, teacher, mapping, shared):
    counts = len(student or range(4)), len(teacher or range(4))
    nets = [build_for_inspection(models.resnet_classifier(count)) for count in counts]
    match = ClassMatcher(lambda count: student, lambda count: teacher).match(nets, ['head.fc'] * 2, mapping)
    assert (match and match.shared) == shared


@pytest.mark.parametrize(
    'fields, message',
    [
        (dict(), r"no class in common \(student: car, bus; teacher: cat, dog, ox\): .*classes=\{'car': 'cat'\}"),
        (dict(classes={'cra': 'cat'}), "contains 'cra', which is not a class of the student; the nearest are 'car'"),
        (dict(classes={'car': 'cta'}), "'cta', which is not a class of the teacher; the nearest are 'cat'"),
        (dict(classes={'car': 'ox', 'bus': 'ox'}), "two classes of the student to the teacher's class 'ox'"),
        (dict(classes={'car': 7}), 'classes=7 must be the number of a class of the teacher, from 0 to 2'),
        (dict(classes={'car': 'cat'}), "classes: student and teacher share only the class 'car = cat'"),
        (dict(classes=['car']), 'must be a dict'),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ValueError, match=f'distill.logits.*{message}'):
        classifier_pair(('car', 'bus'), ('cat', 'dog', 'ox'), **fields)


def test_unknown_names_are_asked_for():
    init_default_scope('mmpretrain')
    cfg = models.distiller(models.resnet_classifier(3), models.resnet_classifier(5))
    cfg.distill = dict(logits=pair_on('head.fc', 'KLDivergence'))
    asked = "has 3 classes and the teacher 5, and the names of the student's and teacher's classes are unknown: set mod"
    with pytest.raises(ValueError, match=f'distill.logits.classes: the student {asked}el.metainfo'):
        MODELS.build(cfg)
    cfg.distill.logits.classes = {0: 4, 2: 1}
    assert MODELS.build(cfg).class_matches['logits'].shared == [(0, 4), (2, 1)]
    cfg.distill = dict(feat=dict(student='backbone', teacher='backbone', classes={0: 4}))
    with pytest.raises(ValueError, match="distill.feat.classes: 'backbone' does not return class scores"):
        MODELS.build(cfg)


def test_softmax_is_over_the_shared_classes():
    """The loss is that of the logits of the shared classes, whatever the other logits are."""
    model = classifier_pair(('cat', 'dog', 'emu'), ('dog', 'ant', 'cat', 'ox'))
    student, teacher = torch.randn(2, 3, 1, 1), torch.randn(2, 4, 1, 1)
    match = model.class_matches['logits']
    (output,) = model.diffkd['logits']([match.select(0, student)], [match.select(1, teacher)])
    ours, theirs = student[:, [0, 1]].flatten(1), teacher[:, [2, 0]].flatten(1)
    p = theirs.softmax(1)
    expected = (p * (p.log() - ours.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(output.losses['loss_kd'], expected)


def test_labels_are_those_of_the_shared_classes():
    model = classifier_pair(('cat', 'dog', 'emu'), ('emu', 'ant', 'cat'), 'DKDLoss')
    assert model.class_matches['logits'].class_numbers().tolist() == [0, -1, 1]
    init_default_scope('mmpretrain')
    samples = [DataSample().set_gt_label(label) for label in (2, 1)]
    images = torch.randn(2, 3, 64, 64)
    student, teacher = torch.randn(2, 2, 1, 1), torch.randn(2, 2, 1, 1)
    context = DistillContext(images, samples, class_numbers=torch.tensor([0, -1, 1]))
    (output,) = model.diffkd['logits']([student], [teacher], context)
    torch.testing.assert_close(output.losses['loss_kd'], DKDLoss()(student, teacher, torch.tensor([1, -1])))


def test_defaults_of_classifiers_and_segmentors(tmp_path):
    """Default pairs compare logits if at least two classes are shared."""
    student = models.resnet_classifier(3)
    for names, pairs in ((['b', 'z', 'c', 'y'], ['feat', 'logits']), (['b', 'z', 'x', 'y'], ['feat'])):
        cfg = models.distiller(student, models.resnet_classifier(4))
        cfg.metainfo, cfg.teacher.metainfo = dict(classes=['a', 'b', 'c']), dict(classes=names)
        assert list(MODELS.build(cfg).pairs) == pairs
    init_default_scope('mmseg')
    student, teacher = models.convnext_segmentor(), models.convnext_segmentor()
    student.decode_head.num_classes = student.auxiliary_head.num_classes = 3
    checkpoint = tmp_path / 'teacher.pth'
    cfg = tiny.distiller_cfg(tmp_path, student, teacher, metainfo=dict(classes=('sky', 'wall', 'x')))
    content = torch.load(checkpoint)
    names = tuple(map(str, range(148))) + ('sky', 'wall')
    torch.save(dict(content, meta=dict(dataset_meta=dict(classes=names))), checkpoint)
    model = tiny.build(cfg)
    assert list(model.pairs) == ['logits']
    assert model.class_matches['logits'].names == ['sky', 'wall']
    assert model.diffkd['logits'].levels[0].proj[0].out_channels == 2
    del cfg.metainfo
    assert list(MODELS.build(cfg).pairs) == ['feat']


@pytest.mark.parametrize('use_sigmoid', [True, False])
def test_anchors_and_background_of_a_dense_head(tmp_path, use_sigmoid):
    """A layer has anchors x classes channels; a softmax head also has the background of each anchor, at the end."""
    student, teacher = detector(2), detector(3)
    if not use_sigmoid:
        student.bbox_head.loss_cls = teacher.bbox_head.loss_cls = dict(type='CrossEntropyLoss', loss_weight=1.0)
    cfg = tiny.distiller_cfg(
        tmp_path, student, teacher, metainfo=dict(classes=('emu', 'dog')), distill=dict(cls=dict()), preset='plus'
    )
    cfg.teacher.metainfo = dict(classes=('dog', 'ox', 'cow'))
    model = tiny.build(cfg)
    widths = (2, 3) if use_sigmoid else (3, 4)
    chosen = ([1], [0]) if use_sigmoid else ([1, 2], [0, 3])
    inputs, samples = tiny.batch(model, num_classes=2)
    losses = model.loss(inputs, samples)
    ours = [level.unflatten(1, (9, widths[0]))[:, :, chosen[0]].flatten(1, 2) for level in model(inputs)[0]]
    theirs = [
        level.unflatten(1, (9, widths[1]))[:, :, chosen[1]].flatten(1, 2)
        for level in model.diffkd_teacher.features(inputs, samples)['bbox_head.retina_cls']
    ]
    expected = sum(map(ChannelWiseDivergence(), ours, theirs))
    torch.testing.assert_close(losses['diffkd.cls.loss_kd'], expected)
    assert losses['diffkd.cls.loss_kd'] > 0
    losses['diffkd.cls.loss_kd'].backward()
    gradient = model.bbox_head.retina_cls.weight.grad.unflatten(0, (9, widths[0]))
    assert not gradient[:, 0].any() and gradient[:, 1].any()


def test_which_layers_return_class_scores():
    net = build_for_inspection(detector(4))
    assert find_class_layer(net, 'bbox_head.retina_cls') == (4, 4)
    # the regression layer has as many channels
    others = ('bbox_head.retina_reg', 'bbox_head.cls_convs.0', 'bbox_head.cls_convs.0.conv', 'neck', 'bbox_head')
    assert [find_class_layer(net, path) for path in others] == [None] * len(others)
    net = build_for_inspection(tiny.detector(tiny.FASTER_RCNN))
    assert find_class_layer(net, 'roi_head.bbox_head.fc_cls') == (80, 81)
    assert [find_class_layer(net, path) for path in ('roi_head.bbox_head.fc_reg', 'rpn_head.rpn_cls')] == [None] * 2


def test_box_head_of_two_stage_detectors(tmp_path):
    heads = {'roi_head.bbox_head.reg_class_agnostic': True}
    student = tiny.detector(tiny.FASTER_RCNN, **{'roi_head.bbox_head.num_classes': 3, **heads})
    teacher = tiny.detector(tiny.FASTER_RCNN, **heads)
    path = 'roi_head.bbox_head.fc_cls'
    cfg = tiny.distiller_cfg(
        tmp_path, student, whole(teacher)['model'], distill=dict(box=pair_on(path, 'KLDivergence'))
    )
    cfg.teacher.config = whole(teacher)
    with pytest.raises(ValueError, match='distill.box: the student has 3 .* set model.metainfo'):
        MODELS.build(cfg)
    cfg.metainfo = dict(classes=('donut', 'person', 'bolt'))
    model = tiny.build(cfg)
    assert model.class_matches['box'].channels(0, 4) == [0, 1, 3]
    assert model.class_matches['box'].channels(1, 81) == [54, 0, 80]
    losses = model.loss(*tiny.batch(model, num_classes=3))
    assert losses['diffkd.box.loss_kd'] > 0


def run_config(shapes, folder, **options):
    """Return the config of a run on the shapes, whose five classes are COCO's, with a teacher of COCO's classes."""
    model = tiny.distiller_cfg(folder, detector(5), detector(80, 16), preset='plus')
    model.teacher.config = whole(model.teacher.config)
    cfg = tiny.run_cfg(model, shapes, folder / 'run', train_cfg__max_epochs=1, **options)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.metainfo = dict(classes=SHAPES)
    return cfg


def test_a_run_knows_its_classes(shapes, tmp_path):
    """The names are those of the data sets of both configs."""
    run = Runner.from_cfg(run_config(shapes, tmp_path))
    assert run.model.class_matches['cls'].names == list(SHAPES)
    assert list(run.model.pairs) == ['fpn', 'cls', 'reg']
    run.train()
    assert run.message_hub.get_scalar('train/diffkd.cls.loss_kd').current() > 0


def test_preview(shapes, tmp_path):
    cfg = run_config(shapes, tmp_path)
    cfg.train_dataloader.dataset.metainfo.classes = (*SHAPES[:4], 'bolt')
    result = preview(cfg, size=(128, 128))
    classes = result['classes']['cls']
    assert (classes['shared'], classes['student'], len(classes['teacher'])) == (list(SHAPES[:4]), ['bolt'], 76)
    of_pair = [row for row in result['pairs'] if row['pair'] == 'cls']
    assert {(row['student_shape'][0], row['teacher_shape'][0]) for row in of_pair} == {(36, 36)}
    assert not [warning for warning in result['warnings'] if 'class' in warning]
    cfg.dump(tmp_path / 'config.py')
    printed = call_tool('analysis_tools/preview.py', tmp_path / 'config.py').stdout
    assert 'Classes that the pair cls compares: stop sign, sports ball, kite, pizza.' in printed
    assert 'Classes of the student that are left out (1): bolt.' in printed
    assert re.search(r'Classes of the teacher that are left out \(76\): person, bicycle, .*, toothbrush\.', printed)


def test_names_of_data_sets(tmp_path):
    assert len(dataset_classes(COCO)) == 80  # the METAINFO of the class
    file = tmp_path / 'names.txt'
    file.write_text('cat\ndog\n')
    wrapped = dict(type='RepeatDataset', times=2, dataset=dict(type='CocoDataset', metainfo=dict(classes=str(file))))
    assert dataset_classes(Config(dict(train_dataloader=dict(dataset=wrapped)))) == ('cat', 'dog')
    custom = dict(type='CustomDataset', classes=['cat', 'dog'])
    cfg = Config(dict(train_dataloader=dict(dataset=custom), default_scope='mmpretrain'))
    assert dataset_classes(cfg) == ('cat', 'dog')
    assert dataset_classes({}) is None
