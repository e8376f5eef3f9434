import json
import os
import signal
import subprocess
import sys
import time

import cv2
import pytest

from tests.conftest import ROOT, load_tool, run_tool

ROWS = ('teacher', 'student alone', 'student, plain MSE', 'student, DiffKD', 'exported student, in plain mmdet')


def parse(monkeypatch, *options):
    """Return the demo with these arguments."""
    demo = load_tool('demo.py')
    monkeypatch.setattr(sys, 'argv', ['demo.py', *map(str, options)])
    return demo.Demo(demo.parse_args())


@pytest.mark.parametrize('option', [['--train-teacher'], ['--epochs', 1], ['--cfg-options', 'a.b=1'], []])
def test_teacher(monkeypatch, tmp_path, option):
    """The shipped teacher belongs to the unchanged config. Otherwise, a teacher is trained."""
    demo = parse(monkeypatch, '--work-dir', tmp_path, *option)
    shipped = ROOT / 'configs' / 'shapes' / 'retinanet-r18-half_16e_shapes.pth'
    epochs = 1 if '--epochs' in option else 16
    trained = tmp_path / 'retinanet-r18-half_16e_shapes' / f'epoch_{epochs}.pth'
    assert demo.teacher_weights() == (trained if option else shipped) and shipped.is_file()
    command = list(map(str, demo.teacher_job(after=[]).command))
    assert command[1].endswith('tools/train.py') and command[3:5] == ['--work-dir', str(trained.parent)]
    assert 'randomness.seed=0' in command and ('a.b=1' in command) is ('a.b=1' in option)
    assert ('train_cfg.max_epochs=1' in command) is ('--epochs' in option)


def test_folders_and_seeds(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse(monkeypatch).work_dir == tmp_path / 'work_dirs' / 'demo'
    demo = parse(monkeypatch, '--seed', 2, '--data', 'images')
    assert demo.work_dir == tmp_path / 'work_dirs' / 'demo_seed2'
    assert demo.overrides()['train_dataloader.dataset.data_root'] == f'{tmp_path}/images/'
    parse(monkeypatch, '--seed', 2, '--work-dir', 'a').check_settings()
    parse(monkeypatch, '--seed', 2, '--work-dir', 'a').check_settings()
    with pytest.raises(SystemExit, match='was made with different settings'):
        parse(monkeypatch, '--seed', 3, '--work-dir', 'a').check_settings()


def test_introduction(monkeypatch, tmp_path):
    """Names the trainings."""
    text = parse(monkeypatch, '--work-dir', tmp_path).introduction()
    assert ': student alone; student, plain MSE; student, DiffKD. The teacher is already trained.\n' in text
    assert f'Results: {tmp_path}' in text and 'Ctrl-C' in text
    text = parse(monkeypatch, '--work-dir', tmp_path, '--train-teacher').introduction()
    assert ': teacher; student alone; ' in text and 'already trained' not in text


@pytest.mark.slow
def test_whole_demo_on_a_few_images(tmp_path, shapes):
    """Interrupt, fail and resume trainings of one epoch; then export, test in plain mmdet, report and draw."""
    work_dir = tmp_path / 'demo'
    options = ('--work-dir', work_dir, '--data', shapes, '--epochs', 1)

    # Ctrl-C ends the running trainings
    command = [sys.executable, ROOT / 'tools' / 'demo.py', *map(str, options)]
    # restore Ctrl-C: background jobs of a shell ignore it, and their processes inherit this setting
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    logs = [work_dir / 'logs' / f'{name}_seed0.log' for name in ('alone', 'fitnet', 'plus')]
    end = time.monotonic() + 300
    while not any(log.exists() and 'mmengine' in log.read_text() for log in logs) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and 'Run the same command to continue' in output, output
    assert str(work_dir) not in subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout

    # one training fails: the end of its log is shown, the others finish
    broken = work_dir / 'fitnet' / 'seed0'
    broken.parent.mkdir(exist_ok=True)
    if broken.exists():
        os.rename(broken, tmp_path / 'moved')
    broken.write_text('a file where a folder should be')
    done = run_tool('demo.py', *options, check=False)
    assert done.returncode == 1 and 'fitnet_seed0: failed with exit code 2' in done.stdout, done.stdout[-3000:]
    assert 'fitnet, seed 0: failed: work_dir=' in done.stdout and 'Failed: fitnet_seed0' in done.stdout
    assert len(list(work_dir.glob('*/seed0/epoch_1.pth'))) == 2

    # the failed training runs again
    broken.unlink()
    done = run_tool('demo.py', *options)
    assert '2 of 3 runs are done' in done.stdout
    rows = json.loads((work_dir / 'models.json').read_text())
    assert tuple(row['name'] for row in rows) == ROWS
    assert rows[0]['params'] > 10 * rows[1]['params'] and rows[1]['multiply_adds'] == rows[3]['multiply_adds']
    assert rows[1]['seconds'] > 0 and rows[0]['seconds'] is None
    table = (work_dir / 'models.md').read_text()
    assert table in done.stdout and all(row['name'] in table and f'{row["mAP"]:.3f}' in table for row in rows)
    assert (work_dir / 'table.md').read_text() in done.stdout
    height, width, _ = cv2.imread(str(work_dir / 'detections.png')).shape
    assert width == 4 * 128 and height > 4 * 128  # ground truth and three models, each below its name
    assert 'plus' in (work_dir / 'report' / 'report.html').read_text()
    for line in ('student.pth', 'detections.png', 'report/report.html', 'tools/compare.py', 'tools/train.py'):
        assert line in done.stdout
