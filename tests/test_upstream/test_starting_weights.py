"""Initial weights of a run, from a seed, a checkpoint or a pretrained backbone."""

import pytest
import torch

from mmdiffkd.engine.checkpoint import PREFIX, without_diffusion_module
from tests import tiny

FRESH = 'The checkpoint has no diffusion module (diffkd.*); the diffusion module keeps its initial weights.'


@pytest.fixture
def start(runner, tmp_path):
    """Return a function that trains for one iteration and returns the initial weights and the log."""

    def train(model_cfg, name, **options):
        run = runner(model_cfg, name, max_iters=1, **options)
        run.train()
        log = next((tmp_path / name).glob('*/*.log')).read_text()
        return run.record.start, log

    return train


def diffusion_module(state_dict):
    return {key: value for key, value in state_dict.items() if key.startswith(PREFIX)}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def test_seed_determines_the_student(start, tmp_path):
    distilled, log = start(tiny.distiller_cfg(tmp_path), 'distilled')
    alone, _ = start(tiny.detector(), 'alone')
    assert_equal(without_diffusion_module(distilled), alone)
    assert diffusion_module(distilled)
    assert FRESH not in log


def test_initialization_of_all_student_layers(start, tmp_path):
    """``init_cfg`` of the model initializes layers by type, as for mmpretrain's ConvNeXt."""
    student = tiny.detector()
    student.init_cfg = dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.2)
    cfg = tiny.distiller_cfg(tmp_path, student=student)
    initialized, _ = start(cfg, 'initialized')
    alone, _ = start(student, 'alone')
    cfg.student = tiny.detector()
    default, _ = start(cfg, 'default')
    assert_equal(without_diffusion_module(initialized), alone)
    assert not torch.equal(alone['bbox_head.retina_cls.weight'], default['bbox_head.retina_cls.weight'])
    assert_equal(diffusion_module(initialized), diffusion_module(default))


def test_checkpoint_of_the_plain_student(runner, start, tmp_path):
    plain = runner(tiny.detector(), 'plain', max_iters=1)
    plain.train()
    file = tmp_path / 'plain' / 'iter_1.pth'
    content = torch.load(file, weights_only=False)
    assert {'dataset_meta', 'cfg', 'mmengine_version'} <= set(content['meta'])

    cfg = tiny.distiller_cfg(tmp_path)
    fresh, _ = start(cfg, 'fresh')
    loaded, log = start(cfg, 'loaded', load_from=str(file))
    assert_equal(without_diffusion_module(loaded), content['state_dict'])
    assert any(not torch.equal(loaded[key], fresh[key]) for key in content['state_dict'])
    assert_equal(diffusion_module(loaded), diffusion_module(fresh))
    assert log.count(FRESH) == 1
    assert 'missing keys' not in log and 'unexpected key' not in log
    assert f'Load checkpoint from {file}' in log


def test_checkpoint_of_the_distilled_student(runner, start, tmp_path):
    cfg = tiny.distiller_cfg(tmp_path)
    runner(cfg, 'first', max_iters=1).train()
    file = tmp_path / 'first' / 'iter_1.pth'
    content = torch.load(file, weights_only=False)['state_dict']
    second, log = start(cfg, 'second', load_from=str(file))
    assert_equal(second, content)
    assert FRESH not in log
    alone, log = start(tiny.detector(), 'alone', load_from=str(file))
    assert_equal(alone, without_diffusion_module(content))
    assert 'missing keys' not in log  # mmengine reports the diffusion module's keys as unexpected


def test_pretrained_backbone(start, tmp_path):
    file = tmp_path / 'backbone.pth'
    donor = torch.load(tiny.write_checkpoint(tiny.detector(), tmp_path / 'donor.pth', seed=5), weights_only=False)
    backbone = {
        key[len('backbone.') :]: value for key, value in donor['state_dict'].items() if key.startswith('backbone.')
    }
    torch.save(dict(state_dict=backbone), file)
    student = tiny.detector()
    student.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(file))
    cfg = tiny.distiller_cfg(tmp_path, student=student)
    pretrained, log = start(cfg, 'pretrained')
    alone, _ = start(student, 'alone')
    cfg.student = tiny.detector()
    fresh, _ = start(cfg, 'fresh')

    assert_equal(without_diffusion_module(pretrained), alone)
    for key, value in backbone.items():
        torch.testing.assert_close(pretrained[f'backbone.{key}'], value, rtol=0, atol=0)
    weights = [key for key in pretrained if key.startswith('neck.') and key.endswith('.weight')]
    assert weights and not any(torch.equal(pretrained[key], donor['state_dict'][key]) for key in weights)
    assert_equal(diffusion_module(pretrained), diffusion_module(fresh))
    assert 'missing keys' not in log and 'unexpected key' not in log
