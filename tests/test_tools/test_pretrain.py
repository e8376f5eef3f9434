"""The command-line tool for pre-training."""

import pytest
from mmengine.config import Config

from tests import tiny
from tests.conftest import ROOT, call_tool, logged
from tests.test_tools.test_report import Page

FAST = ['--cfg-options', 'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']


@pytest.fixture
def arguments(tmp_path, shapes):
    tiny.run_cfg(tiny.detector(), shapes, tmp_path).dump(tmp_path / 'student.py')
    teacher = tiny.detector(base_channels=16)
    Config(dict(model=teacher, default_scope='mmdet')).dump(tmp_path / 'teacher.py')
    tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth')
    (tmp_path / 'images').symlink_to(shapes / 'images')
    models = ['student.py', '--teacher', 'teacher.py', '--checkpoint', 'teacher.pth']
    return [*models, '--images', 'images', '--work-dir', 'work', '--epochs', 2, '--batch-size', 4]


def call(tool, *args, **options):
    return call_tool(tool, *args, env=dict(PYTHONPATH=str(ROOT)), **options)


def test_config_can_be_previewed_and_trained(tmp_path, arguments):
    done = call('pretrain.py', *arguments, '--config-only', *FAST, cwd=tmp_path)
    assert '12 images in' in done.stdout and 'Wrote work/pretrain.py.' in done.stdout
    assert (
        'The config is ready for tools/train.py.'
        in call('analysis_tools/preview.py', 'work/pretrain.py', cwd=tmp_path).stdout
    )
    done = call('train.py', 'work/pretrain.py', '--work-dir', 'work', cwd=tmp_path)
    assert "prefix='neck.'" in done.stdout and (tmp_path / 'work' / 'pretrained.pth').is_file()


@pytest.mark.slow
def test_run_resume_and_report(tmp_path, arguments):
    call('pretrain.py', *arguments, *FAST, 'train_cfg.max_epochs=1', cwd=tmp_path)
    call('pretrain.py', *arguments, '--resume', *FAST, 'default_hooks.logger.type=LoggerHook', cwd=tmp_path)
    assert (tmp_path / 'work' / 'epoch_2.pth').is_file()
    assert [record['step'] for record in logged(tmp_path / 'work')] == [3, 6]
    call('analysis_tools/report.py', 'work', '-o', 'report', cwd=tmp_path)
    assert 'Distillation: fpn' in Page(tmp_path / 'report' / 'report.html').text


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'--images': 'absent'}, "Error: The folder 'absent' does not exist"),
        ({'--images': 'work'}, "Error: No images in 'work': "),
        ({'--preset': 'pdk'}, "Error: There is no preset='pdk'; the nearest are 'pkd'"),
        ({'--teacher': 'absent.py'}, "Error: The config file 'absent.py' does not exist"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, arguments, changes, message):
    (tmp_path / 'work').mkdir()
    options = [part for pair in changes.items() for part in pair]
    done = call('pretrain.py', *arguments, '--config-only', *options, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stdout and 'Traceback' not in done.stdout
