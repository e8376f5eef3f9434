import json
import os
import signal
import subprocess
import sys
import time

import cv2
import pytest

from mmdiffkd.visualization.runs import read_run
from tests.conftest import ROOT, load_tool, run_tool

ROWS = ('teacher', 'student alone', 'student, plain MSE', 'student, DiffKD', 'exported student, in plain mmdet')


def parse(monkeypatch, *options):
    """Return the demo with these arguments."""
    demo = load_tool('demo.py')
    monkeypatch.setattr(sys, 'argv', ['demo.py', *map(str, options)])
    return demo.Demo(demo.parse_args())


@pytest.mark.parametrize('option', [['--train-teacher'], ['--epochs', 1], ['--cfg-options', 'a=1'], []])
def test_order_of_trainings(monkeypatch, tmp_path, option):
    """The longest training starts first. If the teacher must be trained, distilled students wait for it."""
    demo = parse(monkeypatch, '--work-dir', tmp_path, *option)
    jobs = {job.name: job for job in demo.training_jobs(demo.missing())}
    students = ['student, DiffKD', 'student, plain MSE', 'student alone']
    assert list(jobs) == (['teacher', *students] if option else [*students, 'teacher'])
    needs = ['teacher'] if option else []
    assert [list(jobs[name].after) for name in students] == [needs, needs, []]
    shipped = ROOT / 'configs' / 'shapes' / 'retinanet-r18-half_16e_shapes.pth'
    assert demo.teacher_weights == (None if option else shipped) and shipped.is_file()
    if not option:
        assert f'model.teacher.checkpoint={shipped}' in jobs['student, DiffKD'].command()
        assert jobs['teacher'].command[1].name == 'test.py'


def test_folders_and_seeds(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse(monkeypatch).work_dir == tmp_path / 'work_dirs' / 'demo'
    demo = parse(monkeypatch, '--seed', 2)
    assert demo.work_dir == tmp_path / 'work_dirs' / 'demo_seed2'
    assert 'randomness.seed=2' in demo.overrides()
    parse(monkeypatch, '--seed', 2, '--work-dir', 'a').check_settings()
    parse(monkeypatch, '--seed', 2, '--work-dir', 'a').check_settings()
    with pytest.raises(SystemExit, match='was made with different settings'):
        parse(monkeypatch, '--seed', 3, '--work-dir', 'a').check_settings()


def test_introduction(monkeypatch, tmp_path):
    """Names the trainings that are left."""
    demo = parse(monkeypatch, '--work-dir', tmp_path)
    text = demo.introduction(demo.missing())
    assert ': student alone; student, plain MSE; student, DiffKD. The teacher is already trained.\n' in text
    assert f'Results: {tmp_path}' in text and 'Ctrl-C' in text
    assert 'student alone' not in demo.introduction(['student, DiffKD'])
    assert demo.introduction(['teacher']).startswith('All trainings are finished.\n')
    text = parse(monkeypatch, '--work-dir', tmp_path, '--train-teacher').introduction(['teacher', 'student, DiffKD'])
    assert ': teacher; student, DiffKD.\n2 trainings' in text or ': teacher; student, DiffKD.\n1 trainings' in text


def test_preset():
    """The demo uses the recommended preset."""
    demo = load_tool('demo.py')
    assert demo.Config.fromfile(demo.config_of('student, DiffKD')).model.preset == 'plus'


@pytest.mark.slow
def test_whole_demo_on_a_few_images(tmp_path, shapes):
    """Interrupt, fail and resume trainings of one epoch; then export, test in plain mmdet, report and draw."""
    work_dir = tmp_path / 'demo'
    options = ('--work-dir', work_dir, '--data', shapes, '--epochs', 1)

    # Ctrl-C ends both running trainings
    command = [sys.executable, ROOT / 'tools' / 'demo.py', *map(str, options)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = [work_dir / 'logs' / f'retinanet-r18-{model}_shapes.log' for model in ('half_16e', 'eighth_8e')]
    end = time.monotonic() + 300
    while not any(log.exists() and 'mmengine' in log.read_text() for log in logs) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and 'Run the same command to continue' in output
    assert str(work_dir) not in subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout

    # one training fails: the end of its log is shown, the others finish
    broken = work_dir / 'mse_retinanet-r18-half_retinanet-r18-eighth_6e_shapes'
    broken.write_text('a file where a folder should be')
    done = run_tool('demo.py', *options, check=False)
    assert done.returncode == 1 and 'student, plain MSE: failed with exit code 1' in done.stdout
    assert 'FileExistsError' in done.stdout and 'Failed: student, plain MSE' in done.stdout
    folders = [name for name in sorted(os.listdir(work_dir)) if (work_dir / name / 'result.json').exists()]
    assert len(folders) == 3

    # the failed training runs again; a run without a validation is tested
    broken.unlink()
    student = work_dir / 'retinanet-r18-eighth_6e_shapes'
    (student / 'result.json').unlink()
    for log in student.glob('*/vis_data/scalars.json'):
        lines = log.read_text().splitlines(keepends=True)
        log.write_text(''.join(line for line in lines if 'iter' in json.loads(line)))
    done = run_tool('demo.py', *options)
    rows = json.loads((work_dir / 'table.json').read_text())
    assert tuple(row['name'] for row in rows) == ROWS
    assert rows[0]['params'] > 10 * rows[1]['params'] and rows[1]['multiply_adds'] == rows[3]['multiply_adds']
    table = (work_dir / 'table.md').read_text()
    assert table in done.stdout and all(row['name'] in table and f'{row["mAP"]:.3f}' in table for row in rows)
    height, width, _ = cv2.imread(str(work_dir / 'detections.png')).shape
    assert width == 4 * 128 and height > 4 * 128  # ground truth and three models, each below its name
    assert 'DiffKD' in (work_dir / 'report' / 'report.html').read_text()
    assert (student / 'tested').is_dir()
    for line in ('student.pth', 'detections.png', 'report/report.html', 'tools/misc/make_config.py', 'tools/train.py'):
        assert line in done.stdout


@pytest.mark.slow
def test_shipped_teacher_is_only_tested(tmp_path, monkeypatch):
    make_shapes = load_tool('dataset_converters/make_shapes.py')
    for split in make_shapes.SPLITS:
        make_shapes.write_split(tmp_path / 'data', split, 16, 128, 7)
    demo = parse(monkeypatch, '--work-dir', tmp_path, '--data', tmp_path / 'data')
    demo.run_jobs(demo.training_jobs(['teacher']), demo.save_result)
    row = demo.row('teacher')
    assert row['mAP'] > 0.15 and row['seconds'] is None
    assert read_run(demo.reported('teacher')).result('coco/bbox_mAP') == row['mAP']  # a line in the report
    assert not list(demo.folder('teacher').glob('**/*.pth'))
