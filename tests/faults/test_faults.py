"""What goes wrong in long runs, made to happen in real runs; see docs/faults.md, whose table these tests make."""

import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.attack import Attack
from tests.conftest import ROOT, call_tool
from tests.faults.table import row
from tests.same import assert_same

STRATEGY = 'strategy.type=SingleDeviceStrategy'
LAST = 'epoch_3.pth'
HOOKS = [dict(type='EMAHook'), dict(type='mmdiffkd.DistillScheduleHook', warmup=2), dict(type='FaultHook')]


@pytest.fixture
def run(tmp_path, shapes):
    """Write the config of a run over three epochs of four iterations and return what starts it."""

    def options(hooks=(), **changes):
        cfg = tiny.run_cfg(
            tiny.distiller_cfg(tmp_path),
            shapes,
            tmp_path / 'run',
            custom_imports=dict(imports=['mmdiffkd', 'tests.faults.injections'], allow_failed_imports=False),
            train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3, val_begin=99),
            default_hooks__checkpoint=dict(type='mmdiffkd.CheckpointHook', interval=1, max_keep_ckpts=1),
            default_hooks__logger__interval=1,
            optim_wrapper__optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9),
            param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=9)],
            custom_hooks=[*HOOKS, *hooks],
            **changes,
        )
        cfg.pop('experiment_name')
        cfg.dump(tmp_path / 'config.py')

    def start(*args, fault='', work_dir='run', ranks=0, check=False, **env):
        args = [str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / work_dir), *args]
        if not ranks and fault not in ('kill', 'kill while saving', 'disk full'):
            done = call_tool('train.py', *args, check=check, env=dict(env, FAULT=fault))
            return SimpleNamespace(code=done.returncode, output=done.stdout)
        tool = [str(ROOT / 'tools' / 'train.py'), *args]
        if ranks:
            port = 20000 + os.getpid() % 10000
            launch = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', f'--master_port={port}']
            tool = [*launch, *tool, '--launcher', 'pytorch']
        env = dict(os.environ, FAULT=fault, PYTHONPATH=str(ROOT), **env)
        done = subprocess.run([sys.executable, *tool], env=env, capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0 or not check, output[-4000:]
        return SimpleNamespace(code=done.returncode, output=output)

    options()
    return SimpleNamespace(options=options, start=start, folder=tmp_path / 'run')


@pytest.fixture(scope='module')
def undisturbed():
    """Weights that the same run reaches without a fault; filled by the first test that needs them."""
    return {}


def weights(folder):
    content = torch.load(folder / LAST, weights_only=False)
    return {key: content[key] for key in ('state_dict', 'ema_state_dict', 'optimizer')}


def same_as_undisturbed(run, undisturbed):
    if not undisturbed:
        run.start(work_dir='undisturbed', check=True)
        undisturbed.update(weights(run.folder.parent / 'undisturbed'))
    assert_same(weights(run.folder), undisturbed)


def message(done, pattern):
    """The one line of the output that says it."""
    found = re.findall(f'.*?(?:Error: |WARNING - )?({pattern}.*)', done.output)
    assert found, done.output[-3000:]
    return found[-1].strip()


def files(folder):
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != 'config.py')


@pytest.mark.slow
def test_killed_in_an_iteration(run, undisturbed):
    done = run.start(fault='kill')
    assert done.code == -signal.SIGKILL and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
    done = run.start('--resume', check=True)
    same_as_undisturbed(run, undisturbed)
    row(
        'process killed (SIGKILL) in the middle of an epoch',
        'resumed from the last checkpoint; the final weights, optimizer and EMA are bit for bit those of an undisturbed'
        ' run',
        message(done, 'resumed epoch'),
    )


@pytest.mark.slow
def test_killed_while_saving(run, undisturbed):
    done = run.start(fault='kill while saving')
    assert done.code == -signal.SIGKILL
    assert files(run.folder) == ['epoch_1.pth', 'epoch_2.pth.tmp', 'last_checkpoint']  # the old one is still there
    done = run.start('--resume', check=True)
    same_as_undisturbed(run, undisturbed)
    assert files(run.folder) == [LAST, 'last_checkpoint']
    row(
        'process killed (SIGKILL) in the middle of writing a checkpoint, `max_keep_ckpts=1`',
        'the checkpoint before it is there and whole; resumed from it to the same weights bit for bit',
        message(done, 'resumed epoch'),
    )


def test_truncated_checkpoint(run, undisturbed):
    run.options(default_hooks__checkpoint__max_keep_ckpts=2)
    run.start(check=True)
    (run.folder / LAST).write_bytes((run.folder / LAST).read_bytes()[:20000])
    done = run.start('--resume', check=True)
    same_as_undisturbed(run, undisturbed)
    row(
        'newest checkpoint truncated or damaged',
        'the one before it is resumed, to the same weights bit for bit',
        message(done, "'.*is not a PyTorch checkpoint"),
    )


def test_all_checkpoints_damaged(run):
    run.folder.mkdir()
    (run.folder / 'epoch_1.pth').write_bytes(b'damaged')
    done = run.start('--resume')
    assert done.code == 1 and files(run.folder) == ['epoch_1.pth']
    row('all checkpoints damaged', 'stops before training; nothing is overwritten', message(done, 'None of the'))


@pytest.mark.slow
def test_disk_full(run, undisturbed):
    done = run.start(fault='disk full')
    assert done.code == 1 and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
    said = message(done, "'.*could not be written")
    run.start('--resume', check=True)
    same_as_undisturbed(run, undisturbed)
    row(
        'no room left while a checkpoint is written (here: the kernel lets no file grow)',
        'stops; no half file is left, the older checkpoint is whole; with room again, resumed to the same weights',
        said,
    )


def test_teacher_replaced(run, undisturbed):
    teacher = run.folder.parent / 'teacher.pth'
    before = teacher.read_bytes()
    other = tiny.write_checkpoint(tiny.detector(base_channels=16), run.folder.parent / 'other.pth', seed=7)
    run.start(fault='replace teacher', OTHER_TEACHER=other, check=True)
    assert teacher.read_bytes() != before
    same_as_undisturbed(run, undisturbed)
    done = run.start('--resume')
    assert done.code == 1
    row(
        'teacher file replaced during the run',
        'no effect on the run, which holds the weights in memory; a resumed run refuses the other teacher',
        message(done, 'The weights of the teacher'),
    )


@pytest.mark.slow
def test_a_rank_dies(run):
    done = run.start(fault='kill rank 1', ranks=2)
    assert done.code == 1 and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
    said = re.sub(r'\d{3,}', '...', message(done, r'Signal 9 \(SIGKILL\) received by PID'))
    run.start('--resume', ranks=2, check=True)
    run.start(work_dir='undisturbed', ranks=2, check=True)
    assert_same(weights(run.folder), weights(run.folder.parent / 'undisturbed'))
    row(
        'one of two processes dies',
        'the launcher ends the other one and reports which one died; resumed to the weights of an undisturbed run'
        ' of two processes, bit for bit',
        said,
    )


@pytest.mark.parametrize('policy', ['raise', 'skip'])
def test_nan_in_the_batch(run, policy):
    run.options([dict(type='mmdiffkd.NonFiniteHook', policy=policy)] if policy == 'skip' else [])
    done = run.start(fault='nan image')
    if policy == 'raise':
        assert done.code == 1 and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
        said = message(done, 'The loss is not finite in iteration 6')
        row('NaN in an image of the batch', 'stops before the weights are touched', said)
        return
    assert done.code == 0
    state = weights(run.folder)['state_dict']
    assert all(value.isfinite().all() for value in state.values())  # buffers of BatchNorm included
    row(
        "NaN in an image of the batch, `NonFiniteHook(policy='skip')`",
        'the step is left out; weights and running statistics stay finite',
        message(done, 'Iteration 6 was skipped'),
    )


@pytest.mark.parametrize('kind', ['load_from', 'resume', 'teacher', 'test', 'FlexibleRunner'])
def test_code_in_a_checkpoint(run, kind):
    trace = run.folder.parent / 'trace'
    evil = run.folder.parent / 'evil.pth'
    torch.save(dict(state_dict={}, meta=Attack(str(trace))), evil)
    if kind == 'test':
        # the hook, which refuses such a file as well, does not stand in for the tool
        run.options(default_hooks__checkpoint__type='CheckpointHook')
        done = call_tool('test.py', run.folder.parent / 'config.py', evil, check=False)
        done = SimpleNamespace(code=done.returncode, output=done.stdout)
    else:
        options = dict(
            load_from=['--cfg-options', f'load_from={evil}'],
            resume=['--resume', str(evil)],
            teacher=['--cfg-options', f'model.teacher.checkpoint={evil}'],
            FlexibleRunner=['--cfg-options', f'load_from={evil}', 'runner_type=FlexibleRunner', STRATEGY],
        )
        done = run.start(*options[kind])
    assert done.code == 1 and not trace.exists()
    row(
        'code in a checkpoint (teacher, `load_from`, `--resume`, `tools/test.py`)',
        'refused before it is run',
        message(done, 'The checkpoint .*refused'),
    )


@pytest.mark.parametrize('has_hash', [True, False])
def test_interrupted_download(run, has_hash):
    """The server closes the connection half-way."""
    content = (run.folder.parent / 'teacher.pth').read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

    name = f'teacher-{hashlib.sha256(content).hexdigest()[:8]}.pth' if has_hash else 'teacher.pth'
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_address[1]}/{name}'
        cache = run.folder.parent / 'cache'
        options = ['--cfg-options', f'model.teacher.checkpoint={url}']
        done = run.start(*options, TORCH_HOME=str(cache), NO_PROXY='127.0.0.1')
        server.shutdown()
    assert done.code == 1 and not list(cache.rglob('teacher*'))
    said = message(done, 'The checkpoint .*could not be' if has_hash else "'http.*is not a PyTorch checkpoint")
    row(
        f"download of the teacher's weights breaks off, {'a' if has_hash else 'no'} hash in the file's name",
        'stops before training; no half file is left that the next run would take',
        re.sub(r'\(.*?\)', '(...)', re.sub(r'http://[\d.:]+/[-\w.]+', 'teacher.pth', said)),
    )
