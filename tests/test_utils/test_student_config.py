"""The config of the plain student in the work dir of a run."""

import os

import pytest
from mmengine.config import Config
from mmengine.logging import MessageHub

from mmdiffkd.apis import student_config
from mmdiffkd.models.distillers import diffkd_distiller
from mmdiffkd.utils.student_config import write_student_config
from tests import tiny


@pytest.fixture
def cfg(tmp_path):
    """Config of a run whose work dir exists."""
    (tmp_path / 'run').mkdir()
    student = tiny.detector()
    model = dict(type='mmdiffkd.DiffKDDistiller', student=student, teacher=dict(config='absent.py'))
    return Config(dict(model=model, default_scope='mmdet', work_dir=str(tmp_path / 'run')))


def published(cfg):
    """Publish a config as mmengine's RuntimeInfoHook does, and return its text."""
    MessageHub.get_instance('run').update_info('cfg', cfg.pretty_text)
    return cfg.pretty_text


def test_file_is_the_plain_config(cfg, tmp_path):
    write_student_config(cfg.pretty_text)
    assert (tmp_path / 'run' / 'student.py').read_text() == student_config(cfg).pretty_text
    assert [file.name for file in (tmp_path / 'run').iterdir()] == ['student.py']


def test_config_of_the_run_is_not_overwritten(cfg, tmp_path):
    cfg.dump(tmp_path / 'run' / 'student.py')  # the Runner does so if the file of the config has this name
    write_student_config(cfg.pretty_text)
    assert 'student' in Config.fromfile(tmp_path / 'run' / 'student.py').model
    assert Config.fromfile(tmp_path / 'run' / 'plain_student.py').model.type == 'RetinaNet'


@pytest.mark.parametrize('changes', [dict(model=dict(type='RetinaNet')), dict(model=None), dict(work_dir='absent')])
def test_nothing_to_write(cfg, changes, tmp_path):
    write_student_config(Config({**cfg.to_dict(), **changes}).pretty_text)
    assert not any((tmp_path / 'run').iterdir())


def test_unwritable_work_dir_is_a_warning(cfg, tmp_path, capsys):
    (tmp_path / 'run' / 'student.py').mkdir()
    write_student_config(cfg.pretty_text)
    assert 'The config of the plain student was not written: ' in capsys.readouterr().out


@pytest.mark.parametrize('published_first', [True, False])
def test_written_before_the_first_iteration(cfg, published_first, tmp_path):
    """Runner publishes the config before it calls init_weights, FlexibleRunner afterwards."""
    cfg.model.teacher = None
    model = tiny.MODELS.build(cfg.model)
    if published_first:
        published(cfg)
    model.init_weights()
    assert (tmp_path / 'run' / 'student.py').exists() == published_first
    published(cfg)
    model.train()
    os.remove(tmp_path / 'run' / 'student.py')
    model.eval(), model.train()
    assert not (tmp_path / 'run' / 'student.py').exists()  # written once


def test_config_of_a_resumed_checkpoint_is_not_written(cfg, tmp_path):
    """Runner replaces the published config by that of the checkpoint, whose work dir may differ."""
    cfg.model.teacher = None
    model = tiny.MODELS.build(cfg.model)
    published(cfg)
    model.init_weights()
    (tmp_path / 'old').mkdir()
    cfg.work_dir = str(tmp_path / 'old')
    published(cfg)
    model.train()
    assert (tmp_path / 'run' / 'student.py').exists() and not any((tmp_path / 'old').iterdir())


def test_main_process_writes(cfg, tmp_path, monkeypatch):
    cfg.model.teacher = None
    published(cfg)
    monkeypatch.setattr(diffkd_distiller, 'is_main_process', lambda: False)
    tiny.MODELS.build(cfg.model).init_weights()
    assert not any((tmp_path / 'run').iterdir())
