"""Real comparisons, in the processes that a user starts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mmengine.config import Config

from tests import tiny
from tests.conftest import ROOT, call_tool, load_tool, logged

METRIC = 'coco/bbox_mAP'


@pytest.fixture
def files(tmp_path, shapes):
    """Write configs of student and teacher, the weights of the teacher and an arms file; return the common options."""
    student = tiny.run_cfg(
        tiny.detector(),
        shapes,
        tmp_path,
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8, val_interval=8),
        param_scheduler=[],
        default_hooks=dict(logger=dict(interval=1)),
    )
    student.dump(tmp_path / 'student.py')
    teacher = tiny.detector(base_channels=16)
    Config(dict(model=teacher, default_scope='mmdet')).dump(tmp_path / 'teacher.py')
    tiny.write_checkpoint(teacher, tmp_path / 'teacher.pth')
    mse = dict(preset='diffkd', distill=dict(fpn=dict(neck=dict(denoise=False))))
    (tmp_path / 'arms.py').write_text(f'arms = dict(mse={mse})\n')
    return ['student.py', 'teacher.py', '--checkpoint', 'teacher.pth', '--work-dir', 'work', '--arms', 'arms.py']


def call(files, *options, **kwargs):
    return call_tool('compare.py', *files, *options, env=dict(PYTHONPATH=str(ROOT)), **kwargs)


@pytest.mark.slow
def test_two_arms(tmp_path, files):
    """Both students start from the same weights and see the same images. The same command has nothing left to do."""
    done = call(files, '--seeds', 3, '--schedule', 0.25, cwd=tmp_path)
    assert '| mse    | 1     | ' in done.stdout and 'One seed cannot rank methods' in done.stdout
    root = tmp_path / 'work'
    first = {}
    for name in ('alone', 'mse'):
        records = [record for record in logged(root / name / 'seed3') if 'loss' in record]
        assert [record['iter'] for record in records] == [1, 2]
        first[name] = [records[0][key] for key in ('loss_cls', 'loss_bbox')]
    assert first['alone'] == first['mse'] and 'diffkd.fpn.loss_kd' in records[0]
    costs = json.loads((root / 'compare.json').read_text())['costs']
    assert costs['mse']['time'] > 0 and costs['mse']['iterations'] == 2
    results = [json.loads(line) for line in (root / 'results.jsonl').read_text().splitlines()]
    assert [(result['arm'], result['iterations']) for result in results] == [('alone', 2), ('mse', 2)]
    assert all(METRIC in result['val'] for result in results)
    assert 'work/best.py' in done.stdout and Config.fromfile(root / 'best.py').train_cfg.max_iters == 8
    started = {path: path.stat().st_mtime for path in root.glob('*/seed3/*')}
    done = call(files, '--seeds', 3, '--schedule', 0.25, cwd=tmp_path)
    assert '2 of 2 runs are done' in done.stdout
    assert {path: path.stat().st_mtime for path in root.glob('*/seed3/*')} == started


def test_mistakes(tmp_path, files):
    """One sentence, before anything is trained."""
    done = call([*files[:-1], 'absent.py'], cwd=tmp_path, check=False)
    assert done.returncode and 'absent.py' in done.stdout
    (tmp_path / 'empty.py').write_text('arm = dict()\n')
    done = call([*files[:-1], 'empty.py'], cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout.startswith('Error: empty.py defines no arms; write arms = dict(')
    done = call(files, '--presets', 'plsu', cwd=tmp_path, check=False)
    assert done.returncode == 2 and "There is no preset 'plsu'; the nearest are 'plus'" in done.stdout
    assert call(files, '--jobs', 0, cwd=tmp_path, check=False).returncode == 2
    assert not list((tmp_path / 'work').glob('**/*.pth'))


def test_list_presets():
    lines = call_tool('compare.py', '--list-presets').stdout.splitlines()
    assert lines[0].startswith('diffkd ') and any(line.startswith('plus ') for line in lines)


@pytest.mark.slow
def test_interruption(tmp_path, files):
    """A second comparison refuses the folder, Ctrl-C ends all runs, and the same command continues."""
    files += ['--seeds', '0', '1', '--cfg-options', 'train_cfg.max_iters=60', 'train_cfg.val_interval=60']
    files += ['default_hooks.checkpoint.interval=5']
    command = [sys.executable, ROOT / 'tools' / 'compare.py', *files]
    options = dict(cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True)
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # restore Ctrl-C: background jobs of a shell ignore it, and their processes inherit this setting
    process = subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options, **pipe
    )
    end = time.monotonic() + 600
    while not list(tmp_path.glob('work/*/seed*/last_checkpoint')) and time.monotonic() < end:
        time.sleep(0.1)
    second = subprocess.run(command, **options, **pipe)
    assert second.returncode == 2 and f'is running in work (process {process.pid} on ' in second.stdout
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and 'Run the same command to continue' in output, output
    assert str(tmp_path / 'work') not in subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout
    # one run fails
    broken = tmp_path / 'work' / 'mse' / 'seed1'
    assert not broken.exists()
    broken.parent.mkdir(exist_ok=True)
    broken.write_text('a file where a folder should be')
    done = subprocess.run(command, **options, **pipe)
    assert done.returncode == 1 and 'mse, seed 1: failed: work_dir=' in done.stdout, done.stdout[-3000:]
    assert 'Failed: mse_seed1.' in done.stdout
    assert any('resumed' in log.read_text() for log in tmp_path.glob('work/*/seed0/*/*.log'))
    broken.unlink()
    done = subprocess.run(command, **options, **pipe)
    assert done.returncode == 0 and '3 of 4 runs are done' in done.stdout
    # nothing is left to list
    listed = subprocess.run([*command, '--list'], capture_output=True, **options)
    assert listed.stdout == '' and '4 of 4 runs are done' in listed.stderr


@pytest.mark.slow
def test_list_with_a_test_split(tmp_path, files):
    """Train and test with the listed commands, in a shell."""
    files += ['--schedule', '0.25', '--seeds', '0', '--cfg-options', 'test_dataloader.batch_size=1']
    files.append('test_dataloader.dataset.filter_cfg=dict(filter_empty_gt=False)')
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = load_and_list(tmp_path, files, env)
    for line in done.stdout.splitlines():
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=env, capture_output=True)
    done = load_and_list(tmp_path, files, env)
    assert done.stdout == '' and f'{METRIC} (test)' in done.stderr


def load_and_list(folder, files, env):
    command = [sys.executable, ROOT / 'tools' / 'compare.py', *files, '--list']
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)


def test_arms_file(tmp_path):
    file = tmp_path / 'arms.py'
    file.write_text(
        "base = dict(preset='diffkd')\narms = dict(a=base, b=dict(base, init_from_teacher=['neck']), c=None)\n"
    )
    read_arms = load_tool('compare.py').read_arms
    arms = read_arms(file)
    assert arms == dict(a=dict(preset='diffkd'), b=dict(preset='diffkd', init_from_teacher=['neck']), c=None)
    assert list(read_arms(file, ['c', 'a'])) == ['c', 'a']
    with pytest.raises(ValueError, match="arms.py has no arm 'd'; the nearest are 'a'"):
        read_arms(file, ['d'])
    imports = dict(imports=['mmdiffkd'], allow_failed_imports=False)
    file.write_text(f'custom_imports = {imports}\narms = dict(a=dict(preset="diffkd"), c=None)\n')
    assert read_arms(file) == dict(a=dict(custom_imports=imports, preset='diffkd'), c=None)
