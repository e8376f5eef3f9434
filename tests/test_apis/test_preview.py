import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from mmdet.models import RetinaNet
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS
from torch import nn

from mmdiffkd.apis import build_distiller, list_taps, preview
from mmdiffkd.apis.distill_to_text import distill_to_text
from mmdiffkd.apis.preview import checkpoint_problem
from mmdiffkd.models.distillers.recorders import ModuleOutputsRecorder
from mmdiffkd.models.distillers.teacher import Teacher
from mmdiffkd.models.feature_maps import TapError
from mmdiffkd.utils import resolve_config
from mmdiffkd.visualization.feature_panels import draw_features
from tests import tiny
from tests.conftest import ROOT, call_tool, load_tool
from tests.test_upstream import models

TOOL = 'analysis_tools/preview.py'
CONFIG = ROOT / 'configs' / 'diffkd_retinanet_r101_r50.py'
DISTILLATIONS = sorted(
    path
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts and 'student' in Config.fromfile(path).model
)


@pytest.fixture(scope='module')
def retinanet():
    return preview(str(CONFIG))


@pytest.fixture
def small(tmp_path):
    """Return a function that makes a distillation config of a tiny RetinaNet, with optional model settings."""

    def write(student=None, **options):
        model = dict(tiny.distiller_cfg(tmp_path, student, distill=tiny.LIGHT), **options)
        return Config(dict(default_scope='mmdet', custom_imports=dict(imports=['mmdiffkd']), model=model))

    return write


@MODELS.register_module(force=True)
class LateDetector(RetinaNet):
    """Detector with a parameter that is NaN until ``init_weights``, like DETR's uninitialized level embeddings."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.late = nn.Parameter(torch.full((1,), torch.nan))

    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.late)

    def loss(self, *args):
        assert self.late == 0
        return super().loss(*args)


def distillation(student, teacher, **distill):
    """Return a distillation config for two configs of a package."""
    cfg = resolve_config(student)
    model = dict(type='mmdiffkd.DiffKDDistiller', student=cfg.model, teacher=dict(config=teacher, checkpoint='x.pth'))
    cfg.model = dict(model, distill=distill) if distill else model
    return cfg


def test_one_row_per_pair_and_level(retinanet):
    rows = retinanet['pairs']
    assert [(row['pair'], row['level']) for row in rows] == [(p, level) for p in ('fpn', 'reg') for level in range(5)]
    first, last = rows[0], rows[-1]
    assert retinanet['size'] == [800, 1344] and first['student_shape'] == first['teacher_shape'] == [256, 100, 168]
    assert (first['adapter'], first['denoiser'], first['steps']) == (
        '256 -> 256',
        'BottleneckDenoiser',
        [400, 300, 200, 100, 0],
    )
    assert (first['loss_kd'], first['loss_weight']) == ('MSELoss', 5.0)
    assert (first['loss_diffusion_weight'], first['loss_reconstruction_weight']) == (
        1.0,
        None,
    )  # None without autoencoder
    assert (last['loss_diffusion_weight'], last['loss_reconstruction_weight']) == (None, None)
    assert last['student_shape'] == [36, 7, 11] and last['denoiser'] is None and last['loss_kd'] == 'L1Loss'
    assert retinanet['warnings'] == []


def test_costs(retinanet):
    """Costs agree with upstream's figures and with a count by hand."""
    assert retinanet['parameters']['student'] == pytest.approx(37.97e6, rel=1e-3)
    assert retinanet['parameters']['teacher'] == pytest.approx(56.96e6, rel=1e-3)
    # output of upstream's get_flops.py for 800x1344
    assert retinanet['gmacs']['student'] == pytest.approx(250, rel=0.02)

    def block(hidden):
        return 2 * 256 * hidden + 9 * hidden**2

    pixels = sum(row['student_shape'][1] * row['student_shape'][2] for row in retinanet['pairs'][:5])
    denoiser = 2 * block(64) + 256**2
    products = 6 * denoiser + block(32) + 2 * 256**2  # noise adapter, align and proj
    forward = pixels * products / 1e9
    # 1 for the forward pass, 1 to recompute it, and almost 2 for gradients: the teacher's features get no gradient
    assert 3.7 * forward < retinanet['gmacs']['diffusion_module'] < 4 * forward
    assert retinanet['overhead'] == pytest.approx(
        (retinanet['gmacs']['teacher'] + retinanet['gmacs']['diffusion_module']) / retinanet['gmacs']['student'] / 3
    )
    assert 11 < retinanet['kept_mib'] * 2**20 / (pixels * 256 * 4) < 13
    # four bytes per parameter; the diffusion module also has gradients and momentum
    assert retinanet['weights_mb'] == pytest.approx(
        dict(teacher=4 * 56.96, diffusion_module=12 * retinanet['parameters']['diffusion_module'] / 1e6), rel=1e-3
    )


@pytest.mark.parametrize(
    'config',
    [
        'diffkd_retinanet_r101_r50.py',
        'imagenet/diffkd_resnet34_resnet18_100e_in1k.py',
        'camvid/diffkd_deeplabv3-r18-half_deeplabv3-r18-quarter_1500i_camvid.py',
    ],
)
def test_explicit_defaults_build_the_same_modules(config, tmp_path):
    default, distiller = build_distiller(str(ROOT / 'configs' / config))
    text = distill_to_text(distiller)
    explicit = tmp_path / 'explicit.py'
    explicit.write_text(f'{text}\nmodel = dict(distill=distill)\n')
    neck = next(iter(Config.fromfile(explicit).distill.values())).neck
    assert neck.scheduler.num_inference_steps == 5 and neck.noise_adapter.type and neck.denoiser.type
    assert (neck.loss_diffusion_weight, neck.loss_reconstruction_weight, neck.num_grad_steps) == (1.0, 1.0, None)
    default.model['distill'] = Config.fromfile(explicit).distill
    _, same = build_distiller(default)
    assert str(same.diffkd) == str(distiller.diffkd) and same.matched_levels == distiller.matched_levels
    for level, other in zip(*(sum((list(neck.levels) for neck in m.diffkd.values()), []) for m in (distiller, same))):
        assert vars(level.loss_kd).keys() == vars(other.loss_kd).keys()
        plain = (bool, int, float, str, list, type(None))
        for ours, theirs in ((level, other), (level.loss_kd, other.loss_kd)):
            settings = {key: value for key, value in vars(ours).items() if isinstance(value, plain)}
            assert settings == {key: vars(theirs)[key] for key in settings}
    assert distill_to_text(same) == text


# detectors, segmentors and classifiers, which cover autoencoders, MLPs, attention, stochastic depth and plain losses
COUNTED = (
    'diffkd_retinanet_r101_r50.py',
    'coco/diffkd_gfl-r101_gfl-r50_2x_coco.py',
    'coco/diffkd_mask-rcnn-swin-s_mask-rcnn-swin-t_3x_coco.py',
    'cityscapes/diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes.py',
    'ade20k/diffkd_segformer-b2_segformer-b0_160k_ade20k.py',
    'cifar/diffkd_resnet50_resnet18_200e_cifar10.py',
    'imagenet/diffkd-dist_resnet34_resnet18_100e_in1k.py',
    'imagenet/diffkd_resnet50_efficientnet-b0_100e_in1k.py',
)


@pytest.mark.slow
@pytest.mark.parametrize('config', COUNTED)
def test_counts_do_not_depend_on_quick_meta(config, monkeypatch):
    quick = preview(str(ROOT / 'configs' / config))
    for module in ('mmdiffkd.apis.preview', 'mmdiffkd.models.distillers.feature_info'):
        monkeypatch.setattr(import_module(module), 'QuickMeta', nullcontext)
    assert preview(str(ROOT / 'configs' / config)) == quick


def test_number_of_threads_is_restored(small):
    torch.set_num_threads(2)
    try:
        preview(small(), size=(128, 128))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_size_and_options():
    found = preview(str(CONFIG), {'model.distill.fpn.neck': dict(latent_channels=64)}, (256, 320))
    first = found['pairs'][0]
    assert found['size'] == [256, 320] and first['student_shape'] == [256, 32, 40]
    assert first['adapter'] == '256 -> 64' and first['latent_channels'] == 64 and first['autoencoder']
    assert found['kept_mib'] < 12


def test_warnings(tmp_path):
    config = tmp_path / 'upside_down.py'
    config.write_text(
        "_base_ = 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'\n"
        'model = dict(\n'
        "    _delete_=True, type='mmdiffkd.DiffKDDistiller',\n"
        '    student=dict(_base_.model, bbox_head=dict(_base_.model.bbox_head, num_classes=6)),\n'
        "    teacher=dict(config='mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),\n"
        ')\n'
    )
    found = preview(str(config), size=(320, 320))['warnings']
    for text in ('no more than the student', 'normalizes images differently', 'is missing'):
        assert sum(text in warning for warning in found) == 1, text
    assert len(found) == 3  # no warning of different classes, because features do not depend on classes


@pytest.mark.parametrize(
    'name, problem',
    [
        ('', 'is a folder'),
        ('teacher.py', 'is a config'),
        ('https://host/a.pth', None),
        ('petrel:s3://bucket/a.pth', None),
    ],
)
def test_checkpoints_that_cannot_be_read(name, problem, tmp_path):
    (tmp_path / 'teacher.py').write_text('')
    checkpoint = name if ':' in name else tmp_path / name
    found = checkpoint_problem(Teacher(tiny.detector(), checkpoint))
    assert found is None if problem is None else problem in found


def test_absent_checkpoint(small):
    (warning,) = preview(small(), {'model.teacher.checkpoint': 'absent.pth'}, (128, 128))['warnings']
    assert warning.startswith("teacher.checkpoint='absent.pth' does not exist (working directory: ")
    assert warning.endswith('): training would stop before the first iteration.')


def test_missing_student(small):
    cfg = small()
    del cfg.model['student']
    with pytest.raises(ValueError, match='^student is missing: DiffKDDistiller needs it'):
        preview(cfg)


def test_different_classes(small):
    cfg = small(tiny.detector(**{'bbox_head.num_classes': 6}))
    assert not preview(cfg, size=(128, 128))['warnings']
    head = dict(student='bbox_head.retina_cls', teacher='bbox_head.retina_cls')
    (warning,) = preview(cfg, {'model.distill': dict(x=head)}, (128, 128))['warnings']
    assert 'distill.x' in warning and '6 classes and the teacher 80' in warning
    head = dict(student='bbox_head.retina_reg', teacher='bbox_head.retina_reg')
    assert not preview(cfg, {'model.distill': dict(x=head)}, (128, 128))['warnings']


@pytest.mark.slow
def test_different_classes_of_cascaded_heads():
    cfg = distillation(
        'mmseg::ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py',
        'mmseg::ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py',
        x=dict(student='decode_head.1.conv_seg', teacher='decode_head.1.conv_seg'),
    )
    result = preview(cfg, size=(128, 128))
    classes = result['classes']['x']
    assert classes['shared'][:3] == ['road', 'sidewalk', 'building'] and 'train' in classes['student']
    assert not any('classes' in warning for warning in result['warnings'])


def test_taps_around_and_inside_checkpointed_modules(small):
    student = tiny.detector(**{'backbone.with_cp': True})
    around, inside = (dict(student=tap, teacher=tap) for tap in ('backbone.layer3', 'backbone.layer3.1.conv1'))
    assert not preview(small(student, distill=dict(x=around)), size=(128, 128))['warnings']
    with pytest.raises(ValueError, match='no gradient reaches the student.*with reentrant activation checkpointing'):
        preview(small(student, distill=dict(x=inside)))


def test_tokens_of_cropped_images():
    """mmpretrain's pipeline crops images to 224 pixels, the only size that MLP-Mixer accepts."""
    cfg = distillation(
        'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py',
        'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py',
    )
    cfg.model.student.backbone.arch = dict(embed_dims=32, num_layers=2, tokens_mlp_dims=16, channels_mlp_dims=64)
    cfg.model.student.head.in_channels = 32
    found = preview(cfg)
    assert [row['student_shape'] for row in found['pairs']] == [[32, 14, 14], [1000, 1, 1]]
    assert all('x.pth' in warning for warning in found['warnings'])  # weights that do not exist


def test_tap_errors_are_raised(small, monkeypatch):
    class Recorder(ModuleOutputsRecorder):
        def __enter__(self):
            raise TapError('The tap returns a dict.')

    monkeypatch.setattr(sys.modules['mmdiffkd.apis.preview'], 'ModuleOutputsRecorder', Recorder)
    with pytest.raises(TapError, match='returns a dict'):
        preview(small())


def test_student_is_initialized(small):
    student = dict(tiny.detector(), type='LateDetector')
    assert preview(small(student), size=(128, 128))['warnings'] == preview(small(), size=(128, 128))['warnings']


def test_global_state_is_unchanged(small, tmp_path):
    hub = MessageHub.get_current_instance()
    hub.update_info('iter', 7)
    cfg, before = small(), torch.get_rng_state()
    log = tmp_path / 'train.log'
    logger = MMLogger.get_instance('running', log_file=str(log))
    preview(cfg, size=(128, 128))
    assert log.read_text() == '' and len(logger.handlers) == 2
    assert hub.get_info('iter') == 7 and 'epoch' not in hub.runtime_info
    assert torch.equal(torch.get_rng_state(), before)


def test_list_taps():
    student, teacher = (list_taps(str(CONFIG), owner, (320, 320)) for owner in ('student', 'teacher'))
    assert student['neck'] == teacher['neck'] == [[1, 256, size, size] for size in (40, 20, 10, 5, 3)]
    assert student['bbox_head.retina_reg'][0] == [1, 36, 40, 40]
    assert 'backbone.layer3.22' in teacher and 'backbone.layer3.22' not in student
    _, model = build_distiller(str(CONFIG))
    assert set(student) <= {name for name, _ in model.named_modules()}


@pytest.mark.situation(
    'images',
    '`--list-taps` for a model that takes gray images',
    'mmpretrain #753',
    'mmdiffkd runs the model on images with the number of channels that the model takes.',
)
def test_list_taps_of_a_model_for_gray_images():
    assert list_taps('mmpretrain::lenet/lenet5_mnist.py')['backbone.features.0'] == [[1, 6, 28, 28]]


@pytest.mark.situation(
    'images',
    '`--list-taps` for a model whose operators do not run on the meta device',
    '',
    'mmdiffkd runs the model on the CPU instead.',
)
def test_list_taps_of_a_model_with_deformable_convolutions():
    dcn = dict(type='DCN', deform_groups=1, fallback_on_stride=False)
    changes = {'backbone.dcn': dcn, 'backbone.stage_with_dcn': (False, True, True, True), 'backbone.depth': 50}
    widths = {'neck.in_channels': [32, 64, 128, 256]}
    cfg = Config(dict(default_scope='mmdet', model=tiny.detector(**changes, **widths)))
    assert list_taps(cfg, size=(128, 128))['neck'][0] == [1, 16, 16, 16]


def with_channels(channels, width=8):
    """Return a detector for images with this number of channels."""
    preprocessor = dict(_delete_=True, type='DetDataPreprocessor', mean=[100.0], std=[50.0], pad_size_divisor=32)
    return tiny.detector(base_channels=width, **{'backbone.in_channels': channels, 'data_preprocessor': preprocessor})


@pytest.mark.parametrize('channels', [(1, 3), (3, 1), (4, 4)])
def test_images_of_any_number_of_channels(small, tmp_path, channels):
    """Preview, training step and picture of models for such images."""
    student, teacher = with_channels(channels[0]), with_channels(channels[1], 16)
    cfg = Config(dict(default_scope='mmdet', model=tiny.distiller_cfg(tmp_path, student, teacher, distill=tiny.LIGHT)))
    report = preview(cfg, size=(64, 64))
    assert report['gmacs']['student'] and report['gmacs']['teacher']
    found = [text for text in report['warnings'] if 'channels' in text]
    assert len(found) == (channels[0] != channels[1])
    assert not any('random images' in text for text in report['warnings'])
    assert list_taps(cfg, 'student', (64, 64))['backbone.conv1'] == [[1, 8, 32, 32]]
    model = tiny.build(cfg.model)
    model.distill_state.capture = True
    data = demo_mm_inputs(2, [[channels[0], 64, 64]] * 2, num_items=[3, 3], num_classes=80)
    data = model.data_preprocessor(data, True)
    assert model.loss(data['inputs'], data['data_samples'])['diffkd.fpn.loss_kd'] > 0
    record = model.distill_state.last_record
    shown = model.diffkd_teacher.renormalize.displayed(record.images[:1])[0]
    picture = draw_features('fpn', shown, record.outputs['fpn'][0], 1)
    assert shown.shape == (3, 64, 64) and picture.ndim == 3


@pytest.mark.slow
def test_teacher_for_images_of_a_fixed_size(tmp_path):
    student = models.convnext_segmentor()
    cfg = Config(dict(default_scope='mmseg', model=models.distiller(student, models.beit_segmentor())))
    cfg.model.teacher.data_preprocessor = dict(size=None, size_divisor=1)
    warnings = {size: preview(cfg, size=(size, size))['warnings'] for size in (256, 512)}
    assert 'The teacher does not run on images of 256x256, but on images of 512x512' in ' '.join(warnings[256])
    assert 'does not run' not in ' '.join(warnings[512])


def classifier(data_preprocessor, dataset=None, steps=(dict(type='LoadImageFromFile'),)):
    """Return a whole config of a classifier with a pipeline."""
    cfg = models.resnet_classifier()
    cfg.data_preprocessor = dict(type='ClsDataPreprocessor', num_classes=3, **data_preprocessor)
    dataset = dict(type=dataset or 'CustomDataset', pipeline=[*steps, dict(type='PackInputs')])
    return Config(dict(default_scope='mmpretrain', model=cfg, train_dataloader=dict(dataset=dataset)))


def image_warnings(student, teacher, **changes):
    cfg = copy.deepcopy(student)
    teacher = dict(config=teacher.to_dict(), checkpoint='none.pth', **changes)
    cfg.model = dict(type='mmdiffkd.DiffKDDistiller', student=student.model, teacher=teacher)
    words = 'RGB', 'pipeline', 'mean'
    return [text for text in preview(cfg, size=(64, 64))['warnings'] if any(word in text for word in words)]


def test_color_order_of_the_data_sets():
    statistics = dict(mean=[125.0] * 3, std=[60.0] * 3)
    cifar = classifier(dict(to_rgb=False, **statistics), 'CIFAR10', ())
    imagenet = classifier(dict(to_rgb=True, **statistics))
    (warning,) = image_warnings(cifar, imagenet)
    assert "The student's data set gives RGB images and the teacher's BGR: set" in warning
    assert 'teacher=dict(data_preprocessor=dict(to_rgb=False)),' in warning
    assert not image_warnings(cifar, imagenet, data_preprocessor=dict(to_rgb=False))
    assert not image_warnings(imagenet, classifier(dict(to_rgb=False, **statistics)))  # both load BGR
    plain = Config(dict(default_scope='mmpretrain', model=imagenet.model))
    assert 'This assumes that student and teacher load images in the same order' in image_warnings(cifar, plain)[0]


def test_student_that_normalizes_in_its_pipeline():
    steps = [dict(type='LoadImageFromFile'), dict(type='Normalize', mean=[90.0] * 3, std=[30.0] * 3, to_rgb=True)]
    student, teacher = classifier({}, steps=steps), classifier(dict(mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True))
    warning = image_warnings(student, teacher)[-1]
    setting = dict(mean=[1.0] * 3, std=[2.0] * 3, to_rgb=False)
    text = ', '.join(f'{key}={value}' for key, value in setting.items())
    assert "The student's pipeline normalizes images" in warning and f'data_preprocessor=dict({text})' in warning
    assert not image_warnings(student, teacher, data_preprocessor=setting)[1:]


def test_list_taps_with_cfg_options(small):
    narrow = {'model.student.neck.out_channels': 8, 'model.student.bbox_head.in_channels': 8}
    assert list_taps(small(), size=(128, 128), cfg_options=narrow)['neck'][0] == [1, 8, 16, 16]


def test_list_taps_without_a_teacher(small):
    with pytest.raises(ValueError, match='has no teacher'):
        list_taps(small(), 'teacher', cfg_options={'model.teacher': None})


def test_unusable_student_taps():
    """Before training, a tap that is not called as a module and a frozen tap are errors."""
    camvid = ROOT / 'configs' / 'camvid' / 'diffkd_deeplabv3-r18-half_deeplabv3-r18-quarter_1500i_camvid.py'
    head = dict(student='decode_head', teacher='decode_head')
    with pytest.raises(
        ValueError, match="distill.x: the student's 'decode_head' is not called as a module in training"
    ):
        preview(str(camvid), {'model.distill': dict(x=head)})
    stem = dict(student='backbone.layer1', teacher='backbone.layer1')
    with pytest.raises(ValueError, match='distill.x: no gradient reaches the student'):
        preview(str(CONFIG), {'model.distill.x': stem}, size=(128, 128))


@pytest.mark.slow
def test_command():
    text = call_tool(TOOL, CONFIG).stdout
    for part in (
        'bbox_head.retina_reg',
        'BottleneckDenoiser, 5 steps',
        "student='neck'",
        'A tap is a module whose outputs are compared, one',
        'Multiply-adds count convolutions and matrix products',
        'The config is ready for tools/train.py.',
    ):
        assert part in text, part
    assert 'resized' not in text and 'Warning' not in text and max(map(len, text.splitlines())) <= 120
    rows = [line.split() for line in text.splitlines()]
    assert ['fpn', '4', 'neck', '256x7x11', 'neck', '256x7x11'] in rows
    assert ['fpn', '0', '-', '4', *'256 -> 256 256 BottleneckDenoiser, 5 steps MSELoss kd 5'.split()] in rows
    assert ['teacher', '56.96', '185.3', *'forward up to its last tap'.split(), '228'] in rows
    taps = call_tool(TOOL, CONFIG, '--list-taps', 'teacher').stdout
    assert 'neck.fpn_convs.0' in taps and "The teacher's modules" in taps
    options = ['model.student.neck.out_channels=64', 'model.student.bbox_head.in_channels=64']
    text = call_tool(TOOL, CONFIG, '--cfg-options', *options, '--list-taps').stdout  # the default is the student
    assert '1x64x100x168' in text


def test_command_merges_equal_levels_and_reports_warnings(capsys, retinanet):
    tool = load_tool(TOOL)
    rows = [dict(row) for row in retinanet['pairs']]
    rows[1].update(loss_weight=7.0, resized=True)
    unknown = dict(retinanet['gmacs'], teacher=None)
    tool.show(dict(retinanet, pairs=rows, gmacs=unknown, overhead=None, kept_mib=0.001, warnings=['Look here.']))
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert any(line[:4] == ['fpn', '0,', '2,', '3,'] for line in lines) and ['fpn', '1'] in [line[:2] for line in lines]
    assert '256x50x84, resized' in text and 'Features marked as resized' in text
    assert 'question mark' in text and '<0.01 MiB' in text
    assert text.endswith('Warning: Look here.\n')


@pytest.mark.slow
def test_json_is_the_only_output():
    command = [sys.executable, str(ROOT / 'tools' / TOOL), str(CONFIG), '--json', '--size', '320', '320']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)['size'] == [320, 320]


TYPO = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=dict(_base_.model, type='RetinaNett'),
    teacher=dict(config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py', checkpoint='x.pth'),
)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, args, message',
    [
        ('configs/shapes/retinanet-r18-half_16e_shapes.py', [], 'is not a distillation config: its model is a plain'),
        ('configs/absent.py', [], 'absent.py'),
        (
            CONFIG,
            ['--cfg-options', 'model.distill.fpn.student=nick'],
            "no module 'nick' to tap; the nearest are 'neck'",
        ),
        (CONFIG, ['--list-taps', 'teacher', '--cfg-options', 'model.teacher=None'], 'has no teacher'),
        ('x = 1', [], 'has no model'),
        ('model = dict(', [], "mistaken.py', or a config that it inherits, is not valid Python"),
        (TYPO, [], 'RetinaNett is not in the mmdet::model registry: check the spelling of RetinaNett'),
    ],
)
def test_invalid_configs(config, args, message, tmp_path):
    if '=' in str(config):  # text of a config instead of a path
        (tmp_path / 'mistaken.py').write_text(config)
        config = tmp_path / 'mistaken.py'
    done = call_tool(TOOL, config, *args, check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stdout
    assert done.stdout.splitlines()[-1].startswith('Error: ') and message in done.stdout.splitlines()[-1]


@pytest.fixture
def memory_full_of_nan():
    """Fill uninitialized tensors, such as DETR's level embeddings, with NaN instead of arbitrary values."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.slow
@pytest.mark.parametrize('path', DISTILLATIONS, ids=lambda path: path.stem)
def test_shipped_configs(path, memory_full_of_nan):
    assert torch.empty(1).isnan()
    found = preview(str(path))
    assert found['pairs'] and all(min(row['student_shape']) > 0 for row in found['pairs'])
    assert found['gmacs']['diffusion_module'] is not None
    assert not any('not checked in a training pass' in warning for warning in found['warnings'])
    # deformable convolutions do not run on the meta device
    assert (found['gmacs']['teacher'] is None) is ('reppoints-x101' in path.stem)


def test_preset_replaces_preset_and_pairs(small):
    config = small(distill=dict(last=dict(student='backbone', teacher='backbone')))
    result = preview(config, size=(128, 128), preset='mgd')
    assert {row['pair'] for row in result['pairs']} == {'fpn'} and result['gmacs']['diffusion_module'] > 0
    assert result['pairs'][0]['loss_weight'] == 2e-5 and 'mask_ratio=0.65' in result['distill']
    assert list(config.model.distill) == ['last']
    with pytest.raises(ValueError, match="preset='kd' is a method for segmentation and classification, but RetinaNet"):
        preview(config, preset='kd')


def test_labels_of_dkd_are_made_up():
    classifier = models.resnet_classifier()
    config = Config(dict(default_scope='mmpretrain', model=models.distiller(classifier, classifier, preset='dkd')))
    assert preview(config, size=(64, 64))['gmacs']['diffusion_module'] == 0
