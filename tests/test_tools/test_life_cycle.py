"""Train, interrupt, resume, test and export a tiny detector with the tools, in real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mmdet
import pytest
import torch

from tests import tiny
from tests.conftest import ROOT, call_tool, load_tool, logged, run_tool

MMDET_TEST = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py'
# runs a script once for each list of arguments, in a process where this package cannot be imported
WITHOUT_PACKAGE = """
import json, runpy, sys
sys.modules['mmdiffkd'] = None
script = sys.argv[1]
for args in json.loads(sys.argv[2]):
    sys.argv = [script, *args]
    runpy.run_path(script, run_name='__main__')
"""

# a config for test-time augmentation with flipped images
TTA = """
_base_ = 'config.py'
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(128, 128))],
            [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [dict(type='PackDetInputs', meta_keys=meta_keys)],
        ],
    ),
]
"""


@pytest.fixture
def config(tmp_path, shapes):
    """Config file of a run with two epochs of four iterations."""
    cfg = tiny.run_cfg(
        tiny.distiller_cfg(tmp_path),
        shapes,
        tmp_path / 'run',
        custom_imports=dict(imports=['mmdiffkd'], allow_failed_imports=False),
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2, val_interval=1),
        default_hooks__checkpoint=dict(interval=1, max_keep_ckpts=2),
        default_hooks__logger__interval=1,
        param_scheduler=[],
        custom_hooks=[dict(type='EMAHook')],
    )
    cfg.pop('experiment_name')
    cfg.dump(tmp_path / 'config.py')
    return tmp_path / 'config.py'


def metric(records):
    return [record['coco/bbox_mAP_50'] for record in records if 'coco/bbox_mAP_50' in record][-1]


def plain_mmdet(script, *runs):
    """Run a script of mmdet with each of these lists of arguments, and return its output."""
    runs = json.dumps([list(map(str, args)) for args in runs])
    command = [sys.executable, '-c', WITHOUT_PACKAGE, str(script), runs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def map_of_test(work_dir):
    (file,) = work_dir.glob('*/*.json')
    # every process overwrites this file, so the rest of a longer record may follow the first record
    record, _ = json.JSONDecoder().raw_decode(file.read_text())
    return record['coco/bbox_mAP_50']


def test_train_export_and_test_in_plain_mmdet(config, tmp_path):
    run_tool('train.py', config)
    run = tmp_path / 'run'
    records = logged(run)
    first = records[0]
    summed = sum(value for name, value in first.items() if 'loss' in name and name != 'loss')
    assert first['loss'] == pytest.approx(summed, rel=1e-4)
    assert {'diffkd.fpn.loss_kd', 'diffkd.fpn.loss_diffusion', 'diffkd.fpn.gamma', 'diffkd.fpn.gamma.4'} <= set(first)
    expected = metric(records)

    content = torch.load(run / 'epoch_2.pth', weights_only=False)
    assert not any(key.startswith('teacher') for key in content['state_dict'])
    diffusion_keys = [key for key in content['state_dict'] if key.startswith('diffkd.')]
    assert diffusion_keys and set(content['state_dict']) - set(diffusion_keys)

    # the training config tests its checkpoint without the teacher's weights
    (tmp_path / 'teacher.pth').unlink()
    call_tool('test.py', config, run / 'epoch_2.pth', '--work-dir', tmp_path / 'tested')
    assert map_of_test(tmp_path / 'tested') == pytest.approx(expected)

    exported = tmp_path / 'student.py', tmp_path / 'student.pth'
    done = call_tool(
        'model_converters/export_student.py', config, run / 'epoch_2.pth', exported[1], '--config-out', exported[0]
    )
    assert 'plain config of RetinaNet' in done.stdout
    assert exported[1].stat().st_size < (run / 'epoch_2.pth').stat().st_size / 3
    # plain mmdet also loads the training checkpoint
    output = plain_mmdet(
        MMDET_TEST,
        [*exported, '--work-dir', tmp_path / 'plain'],
        [exported[0], run / 'epoch_2.pth', '--work-dir', tmp_path / 'raw'],
    )
    first, _, _ = output.partition('epoch_2.pth')
    assert 'unexpected key' not in first and 'missing key' not in first
    for work_dir in ('plain', 'raw'):
        assert map_of_test(tmp_path / work_dir) == pytest.approx(expected)


@pytest.mark.parametrize('plain', [False, True])
def test_weights_of_another_distiller(config, tmp_path, plain):
    """Predicting finds the student in the file, also with the plain config of the student."""
    from argparse import Namespace

    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from mmdiffkd.apis.export import student_config

    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    weights = {key: torch.full_like(value, 2) for key, value in MODELS.build(cfg.model.student).state_dict().items()}
    content = {f'architecture.{key}': value for key, value in weights.items()}
    torch.save(dict(model=content, optimizer={}, args=Namespace(lr=1)), tmp_path / 'razor.pth')
    if plain:
        config = tmp_path / 'student.py'
        student_config(cfg).dump(config)
    args = Namespace(
        config=str(config),
        checkpoint=str(tmp_path / 'razor.pth'),
        work_dir=str(tmp_path / 'tested'),
        **dict.fromkeys(('cfg_options', 'out', 'show', 'show_dir', 'tta')),
        launcher='none',
        local_rank=0,
    )
    runner = load_tool('test.py').build_runner(args)
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert (runner.model.bbox_head.retina_cls.weight == 2).all()
    log = next((tmp_path / 'tested').glob('*/*.log')).read_text()
    assert "razor.pth': the weights under 'model' are used" in log
    assert "razor.pth': the prefix 'architecture.' of the keys was removed" in log
    assert 'unexpected key' not in log


def test_test_time_augmentation(config, tmp_path):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta=dict()), tmp_path / 'weights.pth')
    augmented = tmp_path / 'augmented.py'
    augmented.write_text(TTA)
    call_tool('test.py', augmented, tmp_path / 'weights.pth', '--work-dir', tmp_path / 'tta', '--tta')
    assert map_of_test(tmp_path / 'tta') >= 0
    done = call_tool('test.py', config, tmp_path / 'weights.pth', '--tta', check=False)
    assert done.returncode == 2 and '--tta needs tta_model and tta_pipeline' in done.stdout


@pytest.mark.parametrize(
    'text, message', [('x = 1', 'has no model'), ('model = dict(', 'is not valid Python'), (None, 'does not exist')]
)
def test_export_of_an_invalid_config(tmp_path, text, message):
    if text is not None:
        (tmp_path / 'mistaken.py').write_text(text)
    tool = 'model_converters/export_student.py'
    done = call_tool(tool, tmp_path / 'mistaken.py', 'absent.pth', tmp_path / 'out.pth', check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stdout
    assert done.stdout.splitlines()[-1].startswith('Error: ') and message in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_killed_run_is_resumed(config, tmp_path):
    run = tmp_path / 'run'
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir', str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / 'last_checkpoint').exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = torch.load(run / 'epoch_1.pth', weights_only=False)
    assert not (run / 'epoch_2.pth').exists()

    done = call_tool('train.py', config, '--work-dir', run, '--resume')
    assert 'resumed epoch: 1, iter: 4' in done.stdout
    assert 'missing keys' not in done.stdout and 'unexpected key' not in done.stdout
    after = torch.load(run / 'epoch_2.pth', weights_only=False)
    counter = 'diffkd.fpn.levels.0.denoiser.layers.3.num_batches_tracked'
    # the denoiser runs six times in each of four iterations
    assert (before['state_dict'][counter], after['state_dict'][counter]) == (24, 48)
    assert len(before['optimizer']['state']) == len(after['optimizer']['state'])


def run_script(name, *args, path=Path(sys.executable).parent, **env):
    """Run a shell script of tools/ with a folder prepended to PATH."""
    env = dict(os.environ, PORT=str(29500 + os.getpid() % 1000), **env)
    env['PATH'] = f'{path}{os.pathsep}{env["PATH"]}'
    command = ['bash', str(ROOT / 'tools' / name), *map(str, args)]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_processes_without_unused_parameters(config, tmp_path):
    """DDP raises in the second iteration if a parameter has no gradient. Uses gloo and the documented script."""
    done = run_script('dist_train.sh', config, 2)
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'find_unused_parameters=True' not in done.stdout
    assert 'GPU number: 2' in done.stdout  # mmengine's name for the number of processes
    train = [record for record in logged(tmp_path / 'run') if 'diffkd.fpn.loss_kd' in record]
    assert len(train) == 4  # two epochs of eight images, on two processes with two images per batch
    checkpoint = tmp_path / 'run' / 'epoch_2.pth'
    done = run_script('dist_test.sh', config, checkpoint, 2, '--work-dir', tmp_path / 'tested')
    assert done.returncode == 0, done.stdout[-4000:]
    # compare with a test: in validation during training, each process uses its own running statistics
    call_tool('test.py', config, checkpoint, '--work-dir', tmp_path / 'tested by one')
    assert map_of_test(tmp_path / 'tested') == pytest.approx(map_of_test(tmp_path / 'tested by one'))


def test_slurm_script(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    done = run_script('slurm_train.sh', 'part', 'name', 'c.py', 'dir', '--amp', path=tmp_path, GPUS='4')
    assert done.returncode == 0
    assert '-p part --job-name=name --gres=gpu:8 --ntasks=4 --ntasks-per-node=8' in done.stdout
    assert done.stdout.rstrip().endswith('tools/train.py c.py --work-dir=dir --launcher=slurm --amp')


# Module for custom_imports that makes the second process's loss infinite in the second iteration.
INFINITE_LOSS = """
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class InfiniteLossHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if get_rank() == 1 and runner.iter == 1:
            level = runner.model.module.diffkd['fpn'].levels[0]
            level.loss_kd.loss_weight = float('inf')
        elif get_rank() == 1:
            runner.model.module.diffkd['fpn'].levels[0].loss_kd.loss_weight = 1.0
"""


@pytest.mark.slow
def test_all_processes_skip_the_same_iteration(config, tmp_path):
    (tmp_path / 'infinite_loss.py').write_text(INFINITE_LOSS)
    with_hook = tmp_path / 'with_hook.py'
    with_hook.write_text(
        "_base_ = 'config.py'\ncustom_imports = dict(imports=['mmdiffkd', 'infinite_loss'])\n"
        "custom_hooks = [dict(type='InfiniteLossHook'), dict(type='mmdiffkd.NonFiniteHook', policy='skip')]\n"
    )
    done = run_script('dist_train.sh', with_hook, 2, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    message = 'Iteration 1 was skipped because of non-finite values in diffkd.fpn.loss_kd (level 0) (1 skipped'
    assert done.stdout.count(message) == 1
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()


@pytest.mark.parametrize('kind, message', [('absent', 'does not exist'), ('html', 'is a web page')])
def test_bad_teacher_stops_before_the_first_iteration(config, tmp_path, kind, message):
    file = tmp_path / f'{kind}.pth'
    if kind == 'html':
        file.write_text('<html>not found</html>')
    done = call_tool('train.py', config, '--cfg-options', f'model.teacher.checkpoint={file}', check=False)
    assert done.returncode == 2 and 'Traceback' not in done.stdout
    assert message in done.stdout.splitlines()[-1]
    assert not logged(tmp_path / 'run')
