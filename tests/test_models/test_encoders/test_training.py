"""Students of mmdet and mmseg learn from models of timm, torchvision and transformers."""

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmdiffkd.apis import list_taps, preview, student_weights
from mmdiffkd.utils.config import get_model_cfg
from tests import tiny
from tests.test_models.test_encoders.encoders import TEACHERS, timm_teacher, torchvision_teacher
from tests.test_tools import runs


def distiller(student, teacher, **options):
    return ConfigDict(dict(type='mmdiffkd.DiffKDDistiller', student=student, teacher=teacher, **options))


def step(model, size=64):
    """Train a step. Return the losses, after checking that the adapters and the student learn from the teacher."""
    losses = model.loss(*tiny.batch(model, size=size))
    sum(loss for key, loss in losses.items() if key.startswith('diffkd.') and 'loss' in key).backward()
    assert all(parameter.grad is not None for parameter in model.diffkd.parameters())
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    return losses


def matched(model):
    return {name: matches for name, (matches,) in model.matched_levels.items()}


@pytest.mark.parametrize(
    'library, levels',
    [
        ('timm', [(0, 0), (1, 0), (2, 0)]),  # a ViT has the stride 16, the FPN 8 to 128
        ('torchvision', [(0, 1), (1, 2), (2, 3)]),
        ('transformers', [(0, 0), (1, 0), (2, 0)]),  # patches of 14 pixels
    ],
)
def test_detector(tmp_path, library, levels):
    teacher, _ = TEACHERS[library](tmp_path)
    model = tiny.build(distiller(tiny.detector(), teacher))
    losses = step(model)
    assert matched(model) == dict(fpn=levels)
    assert type(model.diffkd['fpn'].levels[0].loss_kd).__name__ == 'CosineLoss'
    assert 0 < losses['diffkd.fpn.loss_kd'] < 2 * 6 * len(levels)
    assert not any('diffkd_teacher' in name for name, _ in model.named_modules())


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['diffkd', 'plus', 'pkd', 'cwd', 'mgd', 'at'])
def test_presets(tmp_path, preset):
    teacher, _ = torchvision_teacher(tmp_path)
    model = tiny.build(distiller(tiny.detector(), teacher, preset=preset))
    step(model)
    assert matched(model) == dict(fpn=[(0, 1), (1, 2), (2, 3)])


def test_logits_are_refused(tmp_path):
    init_default_scope('mmseg')
    teacher, _ = torchvision_teacher(tmp_path)
    student = runs.segmentation(tmp_path, None).model.student
    with pytest.raises(ValueError, match='compares logits, but the teacher is an image encoder without logits'):
        MODELS.build(distiller(student, teacher, preset='dist'))


@pytest.mark.parametrize('resize', [None, 2.0, 'native'])
def test_teacher_at_its_own_scale(tmp_path, resize):
    """The teacher gets larger images; its features have the size of the student's levels."""
    teacher, _ = timm_teacher(tmp_path)
    model = tiny.build(distiller(tiny.detector(), dict(teacher, **({'resize': resize} if resize else {}))))
    teacher, seen = model.diffkd_teacher, []
    step(model)
    teacher.running_model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    teacher.running_model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    features = teacher.features(torch.rand(2, 3, 64, 96))['backbone']
    assert tuple(seen[-1]) == {None: (64, 96), 2.0: (128, 192), 'native': (128, 192)}[resize]
    assert features[0].shape[-2:] == (4, 6)


def run(cfg, work_dir, iterations, **options):
    cfg = Config(dict(cfg), format_python_code=False)
    cfg.work_dir = str(work_dir)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=100)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type='mmdiffkd.CheckpointHook', by_epoch=False, interval=2)
    cfg.randomness = dict(seed=0)
    cfg.update(options)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.mark.slow
@pytest.mark.parametrize('package, source', [('mmdet', timm_teacher), ('mmseg', torchvision_teacher)])
def test_train_resume_and_export(tmp_path, shapes, package, source):
    """A resumed run ends with the weights of an uninterrupted one; the plain student opens the exported weights."""
    cfg = runs.RUNS[package](tmp_path, shapes)
    cfg.model = distiller(cfg.model.student, source(tmp_path)[0])
    cfg.custom_imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
    cfg.dump(tmp_path / 'config.py')
    cfg = Config.fromfile(tmp_path / 'config.py', format_python_code=False)
    whole = run(cfg, tmp_path / 'whole', 4).model.state_dict()
    run(cfg, tmp_path / 'parts', 2)
    resumed = run(cfg, tmp_path / 'parts', 4, resume=True).model.state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert not any('teacher' in key for key in whole)
    plain = Config.fromfile(tmp_path / 'parts' / 'student.py')
    init_default_scope(package)
    student = MODELS.build(get_model_cfg(plain))
    student.load_state_dict(student_weights(str(tmp_path / 'parts' / 'iter_4.pth'), cfg)['state_dict'])


def config_file(tmp_path, teacher):
    cfg = Config(dict(model=distiller(tiny.detector(), teacher), default_scope='mmdet'))
    cfg.train_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale=(120, 90))]))
    cfg.dump(tmp_path / 'config.py')
    return str(tmp_path / 'config.py')


def test_preview(tmp_path):
    """The preview needs no weights, tells the size of the teacher's images, and counts their cost."""
    pytest.importorskip('timm')
    teacher = dict(config='timm::eva02_tiny_patch14_224', checkpoint='pretrained')
    report = preview(config_file(tmp_path, teacher))
    text = 'Images of 96x128 are resized for the teacher to 98x126, the nearest multiples of 14'
    assert any(text in note for note in report['warnings'])
    assert report['pairs'][0]['teacher_shape'] == [192, 7, 10] and report['pairs'][0]['loss_kd'] == 'CosineLoss'
    larger = preview(config_file(tmp_path, dict(teacher, resize=2.0)))
    assert larger['gmacs']['teacher'] > 3 * report['gmacs']['teacher']


def test_taps_are_listed(tmp_path):
    teacher = dict(config='torchvision::resnet18', checkpoint='pretrained')
    taps = list_taps(config_file(tmp_path, teacher), 'teacher')
    assert taps['backbone'] == [[1, 64, 56, 56], [1, 128, 28, 28], [1, 256, 14, 14], [1, 512, 7, 7]]
    assert taps['backbone.model.layer1.0.conv1'] == [[1, 64, 56, 56]]


@pytest.mark.parametrize('package', ['mmdet', 'mmpretrain'])
def test_student_of_timm(tmp_path, package):
    """Backbones of timm as students: the wrapper of mmpretrain, which mmdet's example configs use as well."""
    pytest.importorskip('timm')
    backbone = dict(type='mmpretrain.TIMMBackbone', model_name='test_resnet', features_only=True, pretrained=False)
    init_default_scope(package)
    if package == 'mmdet':
        widths = [16, 32, 64, 128]
        student = tiny.detector()
        student.backbone = dict(backbone, out_indices=(1, 2, 3, 4))
        student.neck.in_channels = _widths(backbone, (1, 2, 3, 4)) or widths
        model = tiny.build(distiller(student, tiny.distiller_cfg(tmp_path).teacher))
        data = tiny.batch(model)
    else:
        student = runs.classification(tmp_path, None).model.student
        student.backbone = dict(backbone, out_indices=(4,))
        (student.head.in_channels,) = _widths(backbone, (4,))
        teacher = dict(config=student, checkpoint=tiny.write_checkpoint(student, tmp_path / 'timm.pth'))
        model = tiny.build(distiller(student, teacher))
        samples = [labeled(label) for label in (0, 1)]
        data = torch.rand(2, 3, 64, 64), samples
    total, _ = model.parse_losses(model.loss(*data))
    total.backward()
    name, weight = next(iter(model.backbone.named_parameters()))
    assert name.startswith('timm_model.') and weight.grad.abs().sum() > 0


def _widths(backbone, out_indices):
    from timm import create_model

    return create_model('test_resnet', features_only=True, out_indices=out_indices).feature_info.channels()


def labeled(label):
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(label)
