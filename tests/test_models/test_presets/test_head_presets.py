"""Presets that need boxes or heads: a training step of real detectors, and sentences where a need is not met."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmdiffkd.apis import preview
from tests import tiny

GN = {'bbox_head.norm_cfg': dict(type='GN', num_groups=4, requires_grad=True)}
FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head'
CONFIGS = dict(
    RetinaNet=(tiny.RETINANET, {}),
    FasterRCNN=(tiny.FASTER_RCNN, {}),
    GFL=('mmdet::gfl/gfl_r50_fpn_1x_coco.py', GN),
    ATSS=('mmdet::atss/atss_r50_fpn_1x_coco.py', GN),
    FCOS=(f'{FCOS}_1x_coco.py', GN),
    FCOSNormalized=(f'{FCOS}-center-normbbox-centeronreg-giou_1x_coco.py', GN),
)
LAYERS = dict(RetinaNet='retina', GFL='gfl', ATSS='atss', FCOS='conv', FCOSNormalized='conv')
DENSE = list(LAYERS)
# pairs of each preset, and the detectors that it fits
PRESETS = {
    'fgd': (dict(fpn=['loss_foreground', 'loss_background', 'loss_attention', 'loss_relation']), list(CONFIGS)),
    'ld': (dict(ld=['loss_ld']), ['GFL']),
    'bckd': (dict(bckd=['loss_cls', 'loss_loc']), DENSE),
    'crosskd': (dict(crosskd=['loss_cls', 'loss_reg']), DENSE),
    'cwd_head': (dict(fpn=['loss_kd'], cls=['loss_kd']), [*DENSE, 'FasterRCNN']),
    'cwd_bckd': (dict(fpn=['loss_kd'], bckd=['loss_cls', 'loss_loc']), DENSE),
}
# one detector of each kind of box, in quick tests
QUICK = [
    ('fgd', 'FasterRCNN'),
    ('ld', 'GFL'),
    ('cwd_bckd', 'GFL'),
    ('crosskd', 'FCOSNormalized'),
    ('bckd', 'RetinaNet'),
]
ALL = [(preset, name) for preset, (_, names) in PRESETS.items() for name in names]


def detector(name, **changes):
    config, own = CONFIGS[name]
    return tiny.detector(config, **{**own, **changes})


def build(tmp_path, preset, name, teacher=None, **teacher_changes):
    teacher = detector(teacher or name, **{'base_channels': 16, **teacher_changes})
    return tiny.build(tiny.distiller_cfg(tmp_path, detector(name), teacher, preset=preset))


def step(model, data):
    """Return the losses of a training step, after checking that every trained parameter has a finite gradient."""
    model.zero_grad()
    total, log = model.parse_losses(model.loss(*data))
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()]
    return log


def without_boxes(data, *images):
    for image in images:
        data[1][image].gt_instances = data[1][image].gt_instances[:0]
    return data


@pytest.mark.parametrize(
    'preset, name', [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]
)
def test_training_step(tmp_path, preset, name):
    model = build(tmp_path, preset, name)
    log = step(model, without_boxes(tiny.batch(model), 1))
    losses, _ = PRESETS[preset]
    for pair, names in losses.items():
        assert all(log[f'diffkd.{pair}.{loss}'] > 0 for loss in names)
    if preset == 'cwd_head':  # the other heads scale their boxes after the layer
        assert ('reg' in model.pairs) is (name in ('RetinaNet', 'FasterRCNN'))
    if preset in ('ld', 'bckd', 'cwd_bckd'):
        log = step(model, without_boxes(tiny.batch(model), 0, 1))
        pair = model.pairs[preset.split('_')[-1]]
        assert pair.student == [f'bbox_head.{LAYERS[name]}_{branch}' for branch in ('cls', 'reg')]
        assert all(log[key] == 0 for key in log if key.startswith(f'diffkd.{preset.split("_")[-1]}.loss'))


@pytest.mark.parametrize(
    'preset, name, teacher, changes, message',
    [
        ('ld', 'ATSS', 'ATSS', {}, r'predict distributions of box sides \(GFL\), but the student ATSS has a ATSSHead'),
        (
            'ld',
            'GFL',
            'GFL',
            {'bbox_head.reg_max': 8},
            'equal reg_max in both heads, but the student has 16 and the te',
        ),
        ('bckd', 'FasterRCNN', None, {}, 'but the student FasterRCNN has no bbox_head; choose another preset'),
        ('bckd', 'GFL', 'FasterRCNN', {}, 'but the teacher FasterRCNN has no bbox_head'),
        ('bckd', 'GFL', 'GFL', {'bbox_head.num_classes': 3}, 'equal numbers of classes in both heads, but the student'),
        ('bckd', 'GFL', 'RetinaNet', {}, 'equal numbers of anchors per location in both heads, but the student has 1'),
        (
            'bckd',
            'RetinaNet',
            'RetinaNet',
            {'bbox_head.anchor_generator.ratios': [0.4, 1.0, 2.5]},
            'equal anchors in both heads',
        ),
        (
            'crosskd',
            'GFL',
            'GFL',
            {
                'bbox_head.anchor_generator.strides': [8, 16, 32, 64],
                'neck.num_outs': 4,
            },
            r'equal strides in both heads, but the student has \[8, 16, 32, 64, 128\] and the teacher',
        ),
        ('crosskd', 'FasterRCNN', 'GFL', {}, 'needs a dense head in the student, but FasterRCNN has no bbox_head'),
        ('cwd_head', 'GFL', 'RetinaNet', {}, 'needs a bbox_head or rpn_head with the same anchors and output channels'),
    ],
)
def test_needs(tmp_path, preset, name, teacher, changes, message):
    teacher = detector(teacher or name, **changes)
    cfg = dict(
        type='mmdiffkd.DiffKDDistiller',
        student=detector(name),
        teacher=dict(config=teacher, checkpoint='not-needed.pth'),
        preset=preset,
    )
    with pytest.raises(ValueError, match=message) as error:
        MODELS.build(cfg)
    assert str(error.value).startswith(f"preset='{preset}' needs ")


@pytest.mark.parametrize(
    'preset, name, teacher, changes',
    [
        ('ld', 'GFL', 'GFL', {'bbox_head.num_classes': 3}),
        ('bckd', 'FCOS', 'GFL', {}),
        ('crosskd', 'RetinaNet', 'FCOS', {'bbox_head.num_classes': 3, 'bbox_head.feat_channels': 8}),
    ],
)
def test_unequal_heads_that_fit(tmp_path, preset, name, teacher, changes):
    model = build(tmp_path, preset, name, teacher, **changes)
    log = step(model, tiny.batch(model))
    assert any(value > 0 for key, value in log.items() if key.startswith(f'diffkd.{preset}.loss'))
    if preset == 'crosskd':
        assert [layer.out_channels for layer in model.diffkd['crosskd'].align] == [8, 8]


@pytest.mark.parametrize(
    'taps, neck, message',
    [
        (
            'bbox_head.gfl_cls',
            'LDNeck',
            "needs two taps per model, .* such as .'bbox_head.gfl_cls', 'bbox_head.gfl_reg'",
        ),
        ('bbox_head.gfl_cls', 'BCKDNeck', 'needs two taps per model'),
        ('bbox_head.gfl_cls', 'CrossKDNeck', 'needs two taps per model'),
        (['neck', 'backbone'], 'FGDNeck', 'compares one student tap with one teacher tap'),
    ],
)
def test_wrong_number_of_taps(tmp_path, taps, neck, message):
    pair = dict(student=taps, teacher=taps, neck=dict(type=f'mmdiffkd.{neck}'))
    with pytest.raises(ValueError, match=f'distill.own.neck: {neck} {message}'):
        MODELS.build(tiny.distiller_cfg(tmp_path, detector('GFL'), detector('GFL'), distill=dict(own=pair)))


def test_crosskd_of_neck_features(tmp_path):
    """A head with a single convolution has no middle: the features of the neck run through the teacher's whole head."""
    student = detector('RetinaNet', **{'bbox_head.stacked_convs': 1})
    model = tiny.build(tiny.distiller_cfg(tmp_path, student, detector('RetinaNet'), preset='crosskd'))
    assert model.pairs['crosskd'].student == ['neck', 'neck'] and model.diffkd['crosskd'].num_convs == 4
    assert step(model, tiny.batch(model))['diffkd.crosskd.loss_cls'] > 0


def test_levels_must_be_complete(tmp_path):
    cfg = tiny.distiller_cfg(tmp_path, detector('GFL'), detector('GFL'), preset='ld', distill=dict(ld=dict(levels=[0])))
    model = tiny.build(cfg)
    with pytest.raises(ValueError, match='LDNeck compares all levels of a head: the head of the student has 5 levels'):
        model.loss(*tiny.batch(model))


def test_preview_shows_weights(tmp_path):
    cfg = tiny.distiller_cfg(tmp_path, detector('GFL'), detector('GFL'), preset='cwd_bckd')
    report = preview(Config(dict(model=cfg, default_scope='mmdet')))
    rows = {row['pair']: row for row in report['pairs']}
    assert rows['fpn']['loss_weight'] == 3 and rows['bckd']['loc_weight'] == 4
    assert Config.fromstring(report['distill'], '.py').distill.bckd.neck == dict(
        type='mmdiffkd.BCKDNeck', beta=1.0, cls_weight=1.0, loc_weight=4.0
    )


def test_fgd_weights_follow_the_detector(tmp_path):
    weights = {}
    for name in ('FasterRCNN', 'FCOS', 'RetinaNet'):
        model = MODELS.build(tiny.distiller_cfg(tmp_path, detector(name), detector(name), preset='fgd'))
        neck = model.diffkd['fpn']
        weights[name] = [neck.levels[0].tau, *neck.weights.values()]
    assert weights == dict(
        FasterRCNN=[0.5, 5e-5, 2.5e-5, 5e-5, 5e-7],
        FCOS=[0.8, 1.6e-3, 8e-4, 8e-4, 8e-6],
        RetinaNet=[0.5, 1e-3, 5e-4, 5e-4, 5e-6],
    )


def test_gradients_reach_the_scales_of_a_head(tmp_path):
    model = build(tmp_path, 'ld', 'GFL')
    losses = model.loss(*tiny.batch(model))
    loss = sum(value for key, value in losses.items() if key.startswith('diffkd.ld.loss'))
    gradients = torch.autograd.grad(loss, [scale.scale for scale in model.bbox_head.scales], allow_unused=True)
    assert any(gradient is not None and gradient.abs() > 0 for gradient in gradients)
