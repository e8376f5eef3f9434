import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from mmdiffkd.apis import Job, available_cores, available_gpus, run_parallel
from tests.conftest import ROOT

# script that prints lines in the format of mmengine's logger
LOG = """\
import time
def log(line):
    print('11/28 03:00:00 - mmengine - INFO - ' + line, flush=True)
log('Epoch(train)  [1][10/20]  lr: 1e-03  eta: 0:01:30  time: 0.1  data_time: 0.0  loss: 1.0')
time.sleep(0.7)
log('Epoch(val) [1][5/5]    coco/bbox_mAP: 0.1230  coco/bbox_mAP_50: 0.4000  data_time: 0.0  time: 0.1')
time.sleep(0.7)
log('Epoch(train)  [2][20/20]  lr: 1e-03  eta: 1 day, 0:00:00  time: 0.1  data_time: 0.0  loss: 1.0')
"""


def python(code, name, folder, **kwargs):
    return Job(name, [sys.executable, '-c', code], folder / f'{name}.log', **kwargs)


def test_jobs_run_in_parallel_with_one_thread_each(tmp_path):
    meet = """\
import os, pathlib, sys, time
folder, own, other = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
(folder / own).touch()
end = time.time() + 60
while not (folder / other).exists() and time.time() < end:
    time.sleep(0.01)
print('met', (folder / other).exists(), os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])
"""
    names = ('a', 'b')
    jobs = [
        Job(own, [sys.executable, '-c', meet, tmp_path, own, other], tmp_path / f'{own}.log')
        for own, other in (names, names[::-1])
    ]
    done = []
    results = run_parallel(jobs, workers=2, on_done=done.append, file=io.StringIO())
    assert [result.name for result in results] == ['a', 'b'] and all(result.ok for result in results)
    assert sorted(result.name for result in done) == ['a', 'b'] and results[0].seconds > 0
    assert all(result.log.read_text() == 'met True 1 1\n' for result in results)


def test_jobs_are_distributed_over_gpus(tmp_path):
    """A job sees one GPU, the one with the fewest running jobs."""
    code = f"""\
import os, pathlib, time
gpu = os.environ['CUDA_VISIBLE_DEVICES']
pathlib.Path({str(tmp_path)!r}, f'{{name}}-on-{{gpu}}').touch()
end = time.time() + 60
while len(list(pathlib.Path({str(tmp_path)!r}).glob('*-on-*'))) < 4 and time.time() < end:
    time.sleep(0.01)
print(gpu)
"""
    jobs = [python(code.replace('{name}', name), name, tmp_path) for name in 'abcd']
    results = run_parallel(jobs, workers=4, file=io.StringIO(), gpus=['3', '5'])
    assert sorted(result.log.read_text() for result in results) == ['3\n', '3\n', '5\n', '5\n']


def test_gpus_of_this_process(monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert available_gpus() == ['0', '1']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,GPU-1f')
    assert available_gpus() == ['4', 'GPU-1f']


def test_one_worker_runs_jobs_in_order(tmp_path):
    trace = tmp_path / 'trace'
    code = f"""\
import time
for word in ('begins', 'ends'):
    print('{{name}}', word, file=open(r'{trace}', 'a'))
    time.sleep(0.1)
"""
    jobs = [python(code.replace('{name}', name), name, tmp_path) for name in ('c', 'b', 'a')]
    assert all(result.ok for result in run_parallel(jobs, workers=1, file=io.StringIO()))
    assert trace.read_text().split() == [word for name in 'cba' for word in (name, 'begins', name, 'ends')]


def test_failure_is_shown_and_skips_only_dependent_jobs(tmp_path):
    jobs = [
        python("print('before'); raise RuntimeError('no [red] space')", 'bad', tmp_path),
        python('print(1)', 'needs bad', tmp_path, after=['bad']),
        python('import time; time.sleep(0.5)', 'good', tmp_path),
        python('print(2)', 'needs good', tmp_path, after=['good']),
        python('import os, signal; os.kill(os.getpid(), signal.SIGKILL)', 'killed', tmp_path),
    ]
    out = io.StringIO()
    bad, needs_bad, good, needs_good, killed = run_parallel(jobs, workers=2, file=out)
    assert (bad.returncode, needs_bad.returncode, killed.returncode) == (1, None, -signal.SIGKILL)
    assert good.ok and needs_good.ok and not needs_bad.log.exists()
    text = out.getvalue()
    assert 'bad: failed with exit code 1' in text
    assert 'killed: failed with signal SIGKILL (possibly out of memory)' in text
    assert f'The end of {bad.log}:' in text and '    RuntimeError: no [red] space' in text
    assert 'needs bad: not started: a required job failed' in text


def test_command_can_be_made_when_the_job_starts(tmp_path):
    file = tmp_path / 'file'
    first = python(f"open(r'{file}', 'w').write('written')", 'first', tmp_path)
    second = Job(
        'second', lambda: [sys.executable, '-c', f'print({file.read_text()!r})'], tmp_path / 'log', after=['first']
    )
    assert all(result.ok for result in run_parallel([first, second], workers=2, file=io.StringIO()))
    assert second.log.read_text() == 'written\n'


def test_progress_in_a_file(tmp_path):
    """A file gets a line for each start, progress, new metric and end, without control characters or line wrapping."""
    vis_data = tmp_path / 'work_dir' / '20260101_000000' / 'vis_data'
    vis_data.mkdir(parents=True)
    (vis_data / 'config.py').write_text('train_cfg = dict(max_epochs=2)\n')
    options = dict(work_dir=tmp_path / 'work_dir', metric='coco/bbox_mAP')
    job = python(LOG, 'a student with quite a long name', tmp_path, **options)
    out = io.StringIO()
    run_parallel([job], workers=1, file=out, interval=0.2)
    lines = out.getvalue().splitlines()
    assert all(re.fullmatch(r'\d\d:\d\d:\d\d  a student with quite a long name: [ -~]+', line) for line in lines)
    texts = [line.split(': ', 1)[1] for line in lines]
    assert texts[0] == f'started, log: {job.log}'
    assert 'epoch 1 of 2, 1.5 min left' in texts
    assert texts.index('validating, bbox_mAP 0.1230') > texts.index('epoch 1 of 2, 1.5 min left')
    assert re.fullmatch(r'done after \d s, bbox_mAP 0.1230', texts[-1])


def test_progress_bars_on_a_terminal(tmp_path):
    code = f"""\
import sys
from pathlib import Path
from mmdiffkd.apis import Job, run_parallel
command = [sys.executable, '-c', {LOG!r}]
run_parallel([Job('first', command, Path('first.log')), Job('second', command, Path('second.log'))], workers=1)
"""
    main, terminal = pty.openpty()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TERM': 'xterm', 'COLUMNS': '100'}
    process = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, env=env, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b''
    while select.select([main], [], [], 60)[0]:
        try:
            output += os.read(main, 65536)
        except OSError:  # the process has closed its end of the terminal
            break
    os.close(main)
    assert process.wait() == 0, output.decode()
    text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', output.decode())
    assert re.search(r'first +━+ +epoch 1, 1\.5 min left', text) and re.search(r'second +━+ +waiting', text)
    assert all(re.search(rf'{name} +━+ +done after \d s', text) for name in ('first', 'second'))


INTERRUPTED = """\
import sys
from pathlib import Path
from mmdiffkd.apis import Job, run_parallel
# each process starts a child; the second one ignores Ctrl-C
code = '''
import signal, subprocess, sys, time
if sys.argv[1] == 'ignores':
    signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])
print(child.pid, flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print('interrupted', flush=True)
'''
jobs = [Job(name, [sys.executable, '-c', code, name], Path(f'{name}.log')) for name in ('handles', 'ignores', 'waits')]
run_parallel(jobs, workers=2)
"""


@pytest.mark.parametrize(
    'number',
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))],
)
def test_interruption_ends_all_jobs(tmp_path, number):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, '-c', INTERRUPTED],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # restore Ctrl-C: background jobs of a shell ignore it, and their processes inherit this setting
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    logs = [tmp_path / f'{name}.log' for name in ('handles', 'ignores')]
    end = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith('\n') for log in logs) and time.monotonic() < end:
        time.sleep(0.1)
    children = [int(log.read_text().split()[0]) for log in logs]
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    # some libraries handle an uncaught KeyboardInterrupt and exit with 1
    codes = (-number, 1) if number == signal.SIGINT else (128 + number,)
    assert process.returncode in codes and 'started' in output, output
    assert 'interrupted' in logs[0].read_text() and not (tmp_path / 'waits.log').exists()
    for child in children:
        assert not is_running(child)


def is_running(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    except FileNotFoundError:
        return False


def test_invalid_jobs(tmp_path):
    with pytest.raises(ValueError, match="Two jobs are named 'a'"):
        run_parallel([python('', 'a', tmp_path), python('', 'a', tmp_path)])
    with pytest.raises(ValueError, match="'a' waits for the job 'b', which must be listed before it"):
        run_parallel([python('', 'a', tmp_path, after=['b']), python('', 'b', tmp_path)])
    with pytest.raises(FileNotFoundError):
        run_parallel([Job('a', [str(tmp_path / 'no such program')], tmp_path / 'log')], file=io.StringIO())


def test_available_cores_respect_the_affinity():
    code = 'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); '
    code += 'from mmdiffkd.apis import available_cores; print(available_cores())'
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout == '1\n'
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
