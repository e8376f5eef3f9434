"""Build every method for every task that it supports, train a step with it, and check what it refuses."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmdiffkd.models import Preset
from mmdiffkd.models.distillers.pairs import read_pairs
from mmdiffkd.registry import PRESETS
from mmdiffkd.utils import build_for_inspection
from tests import tiny
from tests.test_models.test_presets.test_default_pairs import labels
from tests.test_upstream import models

METHODS = ('at', 'cosine', 'cwd', 'cwd_norm', 'dist', 'dkd', 'fbkd', 'fitnet', 'kd', 'mgd', 'pkd')
STUDENTS = dict(
    detection=('mmdet', tiny.detector),
    segmentation=('mmseg', models.convnext_segmentor),
    classification=('mmpretrain', models.resnet_classifier),
)
CASES = [(method, task) for method in METHODS for task in STUDENTS if task in PRESETS.get(method).weights]


@pytest.fixture(scope='module')
def distillers(tmp_path_factory):
    """Return a function that builds the distiller of a task with a preset."""
    folder = tmp_path_factory.mktemp('teachers')

    def build(task, **options):
        scope, student = STUDENTS[task]
        init_default_scope(scope)
        return tiny.build(tiny.distiller_cfg(folder, student(), student(), **options))

    return build


@pytest.mark.parametrize('method, task', CASES)
def test_trains_a_step(distillers, method, task):
    model = distillers(task, preset=method)
    images, samples = (
        tiny.batch(model) if task == 'detection' else (torch.randn(2, 3, 224, 224), labels(STUDENTS[task][0], 3))
    )
    total, log = model.parse_losses(model.loss(images, samples))
    total.backward()
    values = [float(value) for name, value in log.items() if name.startswith('diffkd.') and 'loss_' in name]
    assert values and all(0 < value < float('inf') for value in values), log
    untrained = [name for name, p in model.diffkd.named_parameters() if p.grad is None]
    assert not untrained
    assert all(pair.neck['type'] for pair in model.pairs.values())


def pairs_of(method, student, teacher=None, distill=None):
    teacher = teacher or student
    return read_pairs(distill, build_for_inspection(student), student, teacher, method)


def weights_of(method, student):
    return {
        name: (pair.student, pair.levels, pair.neck.get('loss_kd', {}).get('loss_weight'))
        for name, pair in pairs_of(method, student).items()
    }


def test_taps_and_weights():
    detector, segmentor, classifier = (student() for _, student in STUDENTS.values())
    assert weights_of('cwd', detector) == dict(fpn=('neck', None, 10.0))
    assert weights_of('cwd', segmentor) == dict(logits=('decode_head.conv_seg', None, 3.0))
    assert weights_of('cwd', classifier) == dict(feat=('backbone', [-1], 10.0))
    assert weights_of('pkd', segmentor) == dict(feat=('backbone', [-2, -1], 6.0))
    assert weights_of('mgd', segmentor) == dict(
        feat=('backbone', [-1], 2e-5), logits=('decode_head.conv_seg', None, 3.0)
    )
    assert weights_of('dist', classifier) == dict(logits=('head.fc', None, 2.0))
    assert weights_of('fbkd', detector) == dict(fpn=('neck', None, None))


def test_mgd_of_two_stage_detectors():
    (pair,) = pairs_of('mgd', tiny.detector(tiny.FASTER_RCNN)).values()
    assert (pair.neck['mask_ratio'], pair.neck['loss_kd']['loss_weight']) == (0.45, 5e-7)


def test_settings_of_a_default_pair_are_overridden():
    distill = dict(fpn=dict(levels=[1], neck=dict(loss_kd=dict(loss_weight=2.0))))
    (pair,) = pairs_of('cwd_norm', tiny.detector(), distill=distill).values()
    assert pair.student == 'neck' and pair.levels == [1] and pair.neck['denoise'] is False
    assert pair.neck['loss_kd'] == dict(type='mmdiffkd.ChannelWiseDivergence', normalize=True, loss_weight=2.0)
    (pair,) = pairs_of('mgd', tiny.detector(), distill=dict(fpn=dict(neck=dict(mask_ratio=0.5)))).values()
    assert pair.neck['type'] == 'mmdiffkd.MGDNeck' and pair.neck['mask_ratio'] == 0.5


def test_pairs_with_own_taps_use_the_method():
    distill = dict(feat=dict(student='backbone', teacher='backbone'))
    (pair,) = pairs_of('cwd', tiny.detector(), distill=distill).values()
    assert pair.neck == dict(
        type='mmdiffkd.FeatureDiffusionNeck',
        denoise=False,
        loss_kd=dict(type='mmdiffkd.ChannelWiseDivergence', loss_weight=10.0),
    )
    (pair,) = pairs_of('mgd', tiny.detector(), distill=distill).values()
    assert pair.neck['type'] == 'mmdiffkd.MGDNeck'


def test_another_neck_replaces_the_neck_of_the_method():
    distill = dict(fpn=dict(neck=dict(type='mmdiffkd.FeatureDiffusionNeck', denoise=False)))
    (pair,) = pairs_of('mgd', tiny.detector(), distill=distill).values()
    assert 'mask_ratio' not in pair.neck


@pytest.mark.parametrize(
    'method, task, message',
    [
        (
            'dkd',
            'detection',
            "preset='dkd' is a method for classification, but RetinaNet is a model for detection; choose",
        ),
        ('dist', 'detection', "preset='dist' is a method for segmentation and classification, but RetinaNet"),
        ('fbkd', 'segmentation', "preset='fbkd' is a method for detection, but EncoderDecoder is a model for segm"),
    ],
)
def test_tasks_without_the_method_are_refused(method, task, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(method, STUDENTS[task][1]())


def test_missing_logits_are_refused():
    with pytest.raises(
        ValueError, match="preset='kd' compares logits, but the student has 3 classes and the teacher 5."
    ):
        pairs_of('kd', models.resnet_classifier(3), models.resnet_classifier(5))
    multi_label = models.resnet_classifier(4)
    multi_label.head = dict(type='MultiLabelLinearClsHead', num_classes=4, in_channels=64)
    with pytest.raises(ValueError, match='the student ImageClassifier gives several labels per image'):
        pairs_of('dkd', multi_label)
    segmentor = models.convnext_segmentor()
    with pytest.raises(ValueError, match='no default tap for the student EncoderDecoder and the teacher ImageCl'):
        pairs_of('kd', segmentor, models.resnet_classifier())
    other = copy.deepcopy(segmentor)
    other.decode_head.num_classes = 19
    assert list(pairs_of('mgd', segmentor, other)) == ['feat']


def test_vectors_are_refused_by_methods_that_compare_positions():
    vit = models.vit_classifier()
    assert list(pairs_of('at', vit)) == ['feat']
    with pytest.raises(ValueError, match='distill.feat.neck.loss_kd: ATLoss compares positions .* returns vectors'):
        MODELS.build(models.distiller(vit, vit, preset='at'))


def test_own_preset_in_another_module():
    @PRESETS.register_module(name='own')
    class OwnPreset(Preset):
        summary = 'My method'
        weights = dict(detection=2.0)
        distance = dict(type='mmdiffkd.PKDLoss')

        def default_pairs(self, student, student_cfg, teacher_cfg):
            return self.feature_pair(student_cfg, teacher_cfg, denoise=False)

    from mmdiffkd.apis import list_presets

    try:
        assert list_presets()['own'] == 'My method'
        assert weights_of('own', tiny.detector()) == dict(fpn=('neck', None, 2.0))
        with pytest.raises(ValueError, match="preset='own' is a method for detection"):
            pairs_of('own', models.resnet_classifier())
    finally:
        PRESETS.module_dict.pop('own')


def test_presets_are_described():
    own = {name: preset for name, preset in PRESETS.module_dict.items() if preset.__module__.startswith('mmdiffkd.')}
    for name, preset in own.items():  # other tests register presets of their own
        assert preset.summary and len(preset.summary) < 100 and preset.paper and preset.needs, name
        assert preset().name() == name
