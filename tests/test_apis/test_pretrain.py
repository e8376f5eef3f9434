"""Real runs of ``pretrain`` on folders of images, and students that start from the result."""

from pathlib import Path

import pytest
import torch
from mmdet.models import ResNet
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmdiffkd.apis import pretrain, pretrain_config, preview
from mmdiffkd.utils import get_model_cfg
from tests import tiny
from tests.conftest import logged
from tests.test_upstream import models

FAST = {'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False}


def config_of(model, package):
    return Config(dict(model=model, default_scope=package))


def segmentor(base_channels):
    return models.shrunk(
        'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        pretrained=None,
        backbone__depth=18,
        backbone__base_channels=base_channels,
        backbone__stem_channels=base_channels,
        decode_head__in_channels=8 * base_channels,
        auxiliary_head__in_channels=4 * base_channels,
    )


PACKAGES = dict(
    mmdet=lambda width: tiny.detector(base_channels=width),
    mmseg=segmentor,
    mmpretrain=lambda width: models.resnet_classifier(base_channels=width),
)


@pytest.fixture
def pretrain_tiny(tmp_path, shapes, monkeypatch):
    """Pre-train a thin student of a package for a few iterations on the eight training images of the shapes."""
    monkeypatch.chdir(tmp_path)

    def run(package='mmdet', teacher_package=None, function=pretrain, **settings):
        teacher_package = teacher_package or package
        init_default_scope(teacher_package)
        teacher = PACKAGES[teacher_package](16)
        checkpoint = tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth')
        student = config_of(PACKAGES[package](8), package)
        options = {**FAST, 'default_hooks.logger': dict(type='LoggerHook', interval=1)}
        settings = {**dict(epochs=2, batch_size=4, size=64, cfg_options=options), **settings}
        images = str(shapes / 'images' / 'train')
        return function(student, config_of(teacher, teacher_package), checkpoint, images, 'run', **settings)

    return run


def printed_config(base):
    """Return the lines that the log of the run says to paste, applied to the config of the student."""
    log = next(Path('run').glob('*/*.log')).read_text()
    lines = log[log.rindex('\nmodel = dict(') :].split('\n)\n')[0] + '\n)\n'
    base.dump('student.py')
    Path('pasted.py').write_text("_base_ = './student.py'\n" + lines)
    return Config.fromfile('pasted.py')


@pytest.mark.parametrize('package', PACKAGES)
def test_student_starts_from_the_weights(pretrain_tiny, package):
    """The run trains only the distillation, and the lines in its log load what it has trained."""
    result = pretrain_tiny(package)
    records = [record for record in logged(Path('run')) if 'loss' in record]
    assert [record['step'] for record in records] == [1, 2, 3, 4]
    assert all('diffkd.' in key for key in records[0] if 'loss' in key and key != 'loss')
    weights = torch.load(result['weights'], weights_only=True)['state_dict']
    trained = torch.load(result['checkpoint'], weights_only=False)['state_dict']
    assert set(weights) == {key for key in trained if not key.startswith('diffkd.')}
    assert {key.split('.')[0] for key in weights} == ({'backbone', 'neck'} if package == 'mmdet' else {'backbone'})
    cfg = printed_config(config_of(PACKAGES[package](8), package))
    init_default_scope(package)
    student = MODELS.build(get_model_cfg(cfg))
    student.init_weights()
    own = student.state_dict()
    assert all(torch.equal(own[key], value) for key, value in weights.items())
    assert not Path('run', 'student.py').exists()
    report = preview(result['config'])
    assert report['warnings'] == [] and report['untrained'] == [] and report['size'] == [64, 64]


def test_unlike_tasks_compare_backbones(pretrain_tiny):
    cfg = pretrain_tiny('mmdet', 'mmpretrain', pretrain_config)
    assert {name: (pair.student, pair.teacher) for name, pair in cfg.model.distill.items()} == dict(
        feat=('backbone', 'backbone')
    )
    assert 'neck' not in cfg.model.student


@pytest.mark.slow
def test_resume_continues_the_run(pretrain_tiny):
    pretrain_tiny(epochs=2)
    whole = torch.load('run/pretrained.pth', weights_only=True)['state_dict']
    Path('run/epoch_2.pth').unlink()
    Path('run/pretrained.pth').unlink()
    # keep the checkpoint of the first epoch
    keep = {**FAST, 'default_hooks.checkpoint.max_keep_ckpts': 2}
    pretrain_tiny(epochs=2, cfg_options=keep)
    Path('run/epoch_2.pth').unlink()
    pretrain_tiny(epochs=2, cfg_options=keep, resume=True)
    resumed = torch.load('run/pretrained.pth', weights_only=True)['state_dict']
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_defaults(pretrain_tiny):
    cfg = pretrain_tiny(function=pretrain_config, epochs=100, batch_size=64, size=None)
    assert cfg.train_dataloader.batch_size == 8  # the data set has eight images
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(1e-3 * (8 / 64) ** 0.5, rel=0.02)
    warmup, cosine = cfg.param_scheduler
    assert (warmup.end, cosine.begin, cosine.end) == (5, 5, 100)
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 224
    assert cfg.model.student.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert cfg.model.student.data_preprocessor.bgr_to_rgb


@pytest.mark.parametrize('batch_size', [4, 8])
def test_shortest_runs(pretrain_tiny, batch_size):
    """Runs of two iterations or one have no room for a schedule."""
    pretrain_tiny(epochs=1, batch_size=batch_size)
    assert Path('run/pretrained.pth').is_file()


def test_heads_are_left_out(pretrain_tiny, capfd):
    cfg = pretrain_tiny(function=pretrain_config, preset='plus')
    assert list(cfg.model.distill) == ['fpn']
    assert 'Pairs in the heads are left out: cls, reg.' in capfd.readouterr().out


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(package='mmpretrain', preset='kd'), "preset='kd' compares the student's 'head.fc'"),
        (dict(pairs=dict(cls=dict(student='bbox_head.retina_cls', teacher='bbox_head.retina_cls'))), 'distill.cls'),
        (dict(epochs=0), 'epochs=0 must be'),
        (dict(batch_size=1), 'batch_size=1 must be'),
    ],
)
def test_invalid_settings(pretrain_tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        pretrain_tiny(function=pretrain_config, **settings)


def test_invalid_models_and_folders(tmp_path):
    student = config_of(tiny.detector(), 'mmdet')
    (tmp_path / 'empty').mkdir()
    teacher = student, 'weights.pth'
    with pytest.raises(ValueError, match='No images in'):
        pretrain_config(student, *teacher, tmp_path / 'empty')
    with pytest.raises(ValueError, match='images is empty'):
        pretrain_config(student, *teacher)
    with pytest.raises(ValueError, match='is a distillation config'):
        pretrain_config(config_of(tiny.distiller_cfg(tmp_path), 'mmdet'), *teacher, tmp_path)
    with pytest.raises(ValueError, match='has no backbone of its own'):
        pretrain_config(config_of(dict(type='BaseTTAModel'), 'mmdet'), *teacher, tmp_path)
    preprocessor = dict(_delete_=True, type='ImgDataPreprocessor')
    six = tiny.detector(**{'backbone.in_channels': 6, 'data_preprocessor': preprocessor})
    with pytest.raises(ValueError, match='6 channels'):
        pretrain_config(config_of(six, 'mmdet'), student, 'weights.pth', tmp_path)


class OwnResNet(ResNet):
    """A backbone that does not load the weights of ``init_cfg``."""

    def init_weights(self):
        pass


def test_backbones_that_ignore_init_cfg_are_loaded_with_the_whole_model(pretrain_tiny, monkeypatch):
    MODELS.register_module(module=OwnResNet, force=True)
    own = {'backbone.type': 'mmengine.OwnResNet'}
    monkeypatch.setitem(PACKAGES, 'mmdet', lambda width: tiny.detector(base_channels=width, **own))
    result = pretrain_tiny(pairs=dict(feat=dict(student='backbone', teacher='backbone')))
    log = next(Path('run').glob('*/*.log')).read_text()
    assert f'load_from = {result["weights"]!r}' in log and 'weights of the backbone are not loaded' in log
    cfg = config_of(tiny.detector(), 'mmdet')
    cfg.merge_from_dict(dict(work_dir='loaded', load_from=result['weights']))
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    weights = torch.load(result['weights'], weights_only=True)['state_dict']
    assert torch.equal(runner.model.backbone.conv1.weight, weights['backbone.conv1.weight'])


def test_batches_of_several_processes(pretrain_tiny, monkeypatch):
    """Eight images are four for each of two processes, and too few for eight."""
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert pretrain_tiny(function=pretrain_config, batch_size=64).train_dataloader.batch_size == 4
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(ValueError, match='8 images, which are too few: each process needs 2 or more'):
        pretrain_tiny(function=pretrain_config)
