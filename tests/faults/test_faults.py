"""Inject faults into real runs, and check the table in docs/help/faults.md."""

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
    """Write the config of a run with three epochs of four iterations. Return functions to change and start the run."""

    def write_config(hooks=(), **changes):
        cfg = tiny.run_cfg(
            tiny.distiller_cfg(tmp_path, distill=tiny.LIGHT),
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

    write_config()
    return SimpleNamespace(write_config=write_config, start=start, folder=tmp_path / 'run')


@pytest.fixture(scope='module')
def uninterrupted():
    """Weights of the same run without a fault. The first test that needs them fills this dict."""
    return {}


def weights(folder):
    content = torch.load(folder / LAST, weights_only=False)
    return {key: content[key] for key in ('state_dict', 'ema_state_dict', 'optimizer')}


def assert_same_as_uninterrupted(run, uninterrupted):
    if not uninterrupted:
        run.start(work_dir='uninterrupted', check=True)
        uninterrupted.update(weights(run.folder.parent / 'uninterrupted'))
    assert_same(weights(run.folder), uninterrupted)


def message(done, pattern):
    """Return the last output line that matches ``pattern``, without the text before the match."""
    found = re.findall(f'.*?(?:Error: |WARNING - )?({pattern}.*)', done.output)
    assert found, done.output[-3000:]
    return found[-1].strip()


def files(folder):
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix != '.py')


@pytest.mark.slow
def test_killed_in_an_epoch(run, uninterrupted):
    done = run.start(fault='kill')
    assert done.code == -signal.SIGKILL and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
    done = run.start('--resume', check=True)
    assert_same_as_uninterrupted(run, uninterrupted)
    row(
        'process is killed (SIGKILL) in the middle of an epoch',
        'The run resumes from the last checkpoint. The final weights, optimizer state and EMA weights are bit-exact.',
        message(done, 'resumed epoch'),
    )


@pytest.mark.slow
def test_killed_while_saving(run, uninterrupted):
    done = run.start(fault='kill while saving')
    assert done.code == -signal.SIGKILL
    assert files(run.folder) == ['epoch_1.pth', 'epoch_2.pth.tmp', 'last_checkpoint']  # the previous checkpoint is kept
    done = run.start('--resume', check=True)
    assert_same_as_uninterrupted(run, uninterrupted)
    assert files(run.folder) == [LAST, 'last_checkpoint']
    row(
        'process is killed (SIGKILL) while it writes a checkpoint, `max_keep_ckpts=1`',
        'The previous checkpoint is intact, and the run resumes from it. The final weights are bit-exact.',
        message(done, 'resumed epoch'),
    )


def test_truncated_checkpoint(run, uninterrupted):
    run.write_config(default_hooks__checkpoint__max_keep_ckpts=2)
    run.start(check=True)
    (run.folder / LAST).write_bytes((run.folder / LAST).read_bytes()[:20000])
    done = run.start('--resume', check=True)
    assert_same_as_uninterrupted(run, uninterrupted)
    row(
        'newest checkpoint is truncated or damaged',
        'The run resumes from the previous checkpoint. The final weights are bit-exact.',
        message(done, "'.*is not a PyTorch checkpoint"),
    )


def test_all_checkpoints_damaged(run):
    run.folder.mkdir()
    (run.folder / 'epoch_1.pth').write_bytes(b'damaged')
    done = run.start('--resume')
    assert done.code == 2 and files(run.folder) == ['epoch_1.pth']
    row(
        'all checkpoints are damaged',
        'The run stops before training. No file is overwritten.',
        message(done, 'None of the'),
    )


@pytest.mark.slow
def test_disk_full(run, uninterrupted):
    done = run.start(fault='disk full')
    assert done.code == 2 and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
    text = message(done, "'.*could not be written")
    run.start('--resume', check=True)
    assert_same_as_uninterrupted(run, uninterrupted)
    row(
        'disk full while a checkpoint is written (simulated by a limit of the file size)',
        'The run stops and leaves no partial file. It resumes when there is free space. '
        'The final weights are bit-exact.',
        text,
    )


def test_teacher_replaced(run, uninterrupted):
    teacher = run.folder.parent / 'teacher.pth'
    before = teacher.read_bytes()
    other = tiny.write_checkpoint(tiny.detector(base_channels=16), run.folder.parent / 'other.pth', seed=7)
    run.start(fault='replace teacher', OTHER_TEACHER=other, check=True)
    assert teacher.read_bytes() != before
    assert_same_as_uninterrupted(run, uninterrupted)
    done = run.start('--resume')
    assert done.code == 2
    row(
        'teacher file is replaced during the run',
        'The run continues, because it has the weights in memory. It cannot be resumed with the new teacher file.',
        message(done, 'The weights of the teacher'),
    )


@pytest.mark.slow
def test_killed_rank(run):
    done = run.start(fault='kill rank 1', ranks=2)
    assert done.code == 1 and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
    text = re.sub(r'\d{3,}', '...', message(done, r'Signal 9 \(SIGKILL\) received by PID'))
    run.start('--resume', ranks=2, check=True)
    run.start(work_dir='uninterrupted', ranks=2, check=True)
    assert_same(weights(run.folder), weights(run.folder.parent / 'uninterrupted'))
    row(
        'one of two processes is killed (SIGKILL)',
        'The launcher stops the second process and reports the killed process. The run resumes. The '
        'final weights are bit-exact.',
        text,
    )


@pytest.mark.parametrize('policy', ['raise', 'skip'])
def test_nan_in_the_batch(run, policy):
    run.write_config([dict(type='mmdiffkd.NonFiniteHook', policy=policy)] if policy == 'skip' else [])
    done = run.start(fault='nan image')
    if policy == 'raise':
        assert done.code == 1 and files(run.folder) == ['epoch_1.pth', 'last_checkpoint']
        text = message(done, 'The loss is not finite in iteration 6')
        row('NaN in an image of the batch', 'Training stops before the weights change.', text)
        return
    assert done.code == 0
    state = weights(run.folder)['state_dict']
    assert all(value.isfinite().all() for value in state.values())  # parameters and BatchNorm's statistics
    row(
        "NaN in an image of the batch, `NonFiniteHook(policy='skip')`",
        'The optimizer step is skipped. Weights and running statistics stay finite.',
        message(done, 'Iteration 6 was skipped'),
    )


@pytest.mark.parametrize('kind', ['load_from', 'resume', 'teacher', 'test', 'FlexibleRunner'])
def test_code_in_a_checkpoint(run, kind):
    trace = run.folder.parent / 'trace'
    evil = run.folder.parent / 'evil.pth'
    torch.save(dict(state_dict={}, meta=Attack(str(trace))), evil)
    if kind == 'test':
        # use upstream's hook, because mmdiffkd.CheckpointHook would refuse the file before tools/test.py can
        run.write_config(default_hooks__checkpoint__type='CheckpointHook')
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
    assert done.code == 2 and not trace.exists()
    row(
        'code in a checkpoint (teacher, `load_from`, `--resume`, `tools/test.py`)',
        'The file is refused, and the code does not run.',
        message(done, 'The checkpoint .*refused'),
    )


@pytest.mark.parametrize('has_hash', [True, False])
def test_interrupted_download(run, has_hash):
    """Download from a server that closes the connection halfway."""
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
    assert done.code == 2 and not list(cache.rglob('teacher*'))
    text = message(done, 'The checkpoint .*could not be' if has_hash else "'http.*is not a PyTorch checkpoint")
    row(
        f"interrupted download of the teacher's weights, {'' if has_hash else 'no '}hash in the file name",
        'The run stops before training. No partial file is left in the cache.',
        re.sub(r'\(.*?\)', '(...)', re.sub(r'http://[\d.:]+/[-\w.]+', 'teacher.pth', text)),
    )
