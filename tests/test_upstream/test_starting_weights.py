"""Initial weights of a run, from a seed, a checkpoint or a pretrained backbone."""

import http.server
import re
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdiffkd.engine.checkpoint import PREFIX, without_diffusion_module
from tests import tiny
from tests.attack import Attack

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

    cfg = tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)
    fresh, _ = start(cfg, 'fresh')
    loaded, log = start(cfg, 'loaded', load_from=str(file))
    assert_equal(without_diffusion_module(loaded), content['state_dict'])
    assert any(not torch.equal(loaded[key], fresh[key]) for key in content['state_dict'])
    assert_equal(diffusion_module(loaded), diffusion_module(fresh))
    assert log.count(FRESH) == 1
    assert 'missing keys' not in log and 'unexpected key' not in log
    assert f'Load checkpoint from {file}' in log


def test_checkpoint_of_the_distilled_student(runner, start, tmp_path):
    cfg = tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)
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


class TestForeignCheckpoint:
    """``load_from`` with files that another project wrote."""

    @pytest.fixture
    def cfg(self, tmp_path):
        return tiny.distiller_cfg(tmp_path)

    @pytest.fixture
    def weights(self, tmp_path):
        tiny.write_checkpoint(tiny.detector(), tmp_path / 'student.pth', seed=7)
        return torch.load(tmp_path / 'student.pth')['state_dict']

    @pytest.mark.parametrize('hook', ['mmdiffkd.CheckpointHook', 'CheckpointHook'])
    def test_mmrazor_checkpoint(self, start, cfg, weights, tmp_path, hook):
        """The student under ``architecture.`` is found, with and without the hook of this package."""
        teacher = torch.load(tmp_path / 'teacher.pth')['state_dict']
        both = {
            f'{name}.{k}': v for name, w in dict(architecture=weights, teacher=teacher).items() for k, v in w.items()
        }
        torch.save(dict(state_dict=both), tmp_path / 'razor.pth')
        load_from = str(tmp_path / 'razor.pth')
        loaded, log = start(cfg, 'run', load_from=load_from, default_hooks__checkpoint__type=hook)
        assert_equal(without_diffusion_module(loaded), weights)
        assert "the weights under 'architecture.' are used, and 156 under 'teacher.' are left out" in log
        assert 'unexpected key' not in log and 'missing keys' not in log

    @pytest.mark.parametrize('kind', ['model', 'safetensors'])
    def test_other_trainer_with_ema_hook(self, start, cfg, weights, tmp_path, kind):
        """mmengine's ``EMAHook`` reads the checkpoint, too."""
        file = tmp_path / f'weights.{kind}'
        if kind == 'model':
            torch.save(dict(model=weights, args=Namespace(lr=0.1)), file)
        else:
            save_file(weights, file)
        options = dict(custom_hooks=[dict(type='EMAHook')], default_hooks__checkpoint__type='mmdiffkd.CheckpointHook')
        loaded, log = start(cfg, 'run', load_from=str(file), **options)
        assert_equal(without_diffusion_module(loaded), {key: weights[key] for key in without_diffusion_module(loaded)})

    @pytest.mark.situation(
        'weights',
        'Checkpoint of a different model as `load_from`',
        'mmrazor #613, mmdetection #2175',
        'If no weight fits the student, mmdiffkd raises an error before training. If less than half of the weights '
        'fit, it prints a warning with their number.',
    )
    def test_file_of_a_backbone(self, start, cfg, weights, tmp_path):
        backbone = {key[len('backbone.') :]: value for key, value in weights.items() if key.startswith('backbone.')}
        torch.save(backbone, tmp_path / 'resnet18.pth')
        message = r"resnet18.pth' fills none of the .* weights of .*: its keys are those of the model's backbone only"
        with pytest.raises(ValueError, match=message):
            start(
                cfg,
                'run',
                load_from=str(tmp_path / 'resnet18.pth'),
                default_hooks__checkpoint__type='mmdiffkd.CheckpointHook',
            )

    def test_backbone_of_a_detector_is_usual(self, start, cfg, weights, tmp_path):
        torch.save({k: v for k, v in weights.items() if k.startswith('backbone.')}, tmp_path / 'backbone.pth')
        _, log = start(cfg, 'whole', load_from=str(tmp_path / 'backbone.pth'))
        assert 'of the student' not in log
        torch.save({k: v for k, v in weights.items() if k.startswith('neck.')}, tmp_path / 'neck.pth')
        _, log = start(cfg, 'part', load_from=str(tmp_path / 'neck.pth'))
        assert re.search(r'The checkpoint.* fills 16 of the 136 weights of the student; the others keep', log)

    def test_weights_alone_cannot_be_resumed(self, start, cfg, weights, tmp_path):
        torch.save(dict(model=weights), tmp_path / 'weights.pth')
        options = dict(resume=True, default_hooks__checkpoint__type='mmdiffkd.CheckpointHook')
        with pytest.raises(
            ValueError, match="cannot be resumed: the file has no key 'meta'; to start from its weights"
        ):
            start(cfg, 'run', load_from=str(tmp_path / 'weights.pth'), **options)


def test_server_that_changes_its_answer_during_the_run(start, tmp_path, monkeypatch):
    """The download that was checked is loaded: the server sends each file once."""
    folder = tmp_path / 'served'
    folder.mkdir()
    pretrained = tiny.write_checkpoint(tiny.detector(), folder / 'pretrained.pth', seed=5)
    tiny.write_checkpoint(tiny.detector(), folder / 'student.pth', seed=6)
    expected = torch.load(folder / 'student.pth')['state_dict']
    trace = tmp_path / 'trace'

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            super().do_GET()
            torch.save(Attack(str(trace)), folder / self.path[1:])

        def log_message(self, *args):
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    cfg = tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f'http://127.0.0.1:{server.server_port}'
        cfg.student.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=f'{address}/{Path(pretrained).name}', prefix='backbone.'
        )
        options = dict(default_hooks__checkpoint__type='mmdiffkd.CheckpointHook')
        loaded, log = start(cfg, 'run', load_from=f'{address}/student.pth', **options)
        server.shutdown()
        thread.join()
    assert_equal(without_diffusion_module(loaded), expected)
    assert not trace.exists()
