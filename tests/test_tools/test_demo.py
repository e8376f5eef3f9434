import json
import shutil
import sys

import cv2
import numpy as np
import pytest

from tests.conftest import load_tool, run_tool


@pytest.mark.slow
def test_whole_demo_on_a_few_images(tmp_path, shapes):
    """Four trainings of an epoch, export, reload in plain mmdet and the picture."""
    work_dir = tmp_path / 'demo'
    options = ('--work-dir', work_dir, '--data', shapes, '--epochs', 1)
    done = run_tool('demo.py', *options)
    rows = json.loads((work_dir / 'table.json').read_text())
    assert [row['name'] for row in rows] == [
        'teacher',
        'student alone',
        'student, plain MSE',
        'student, DiffKD',
        'the same, exported, in plain mmdet',
    ]
    assert rows[0]['params'] > 10 * rows[1]['params'] and rows[1]['flops'] == rows[3]['flops']
    assert all(f'| {row["name"]} | {row["mAP"]:.3f} |' in done.stdout for row in rows)
    assert cv2.imread(str(work_dir / 'detections.png')).shape == (256, 4 * 128, 3)  # truth above, four images

    # what is done is not done again; an interruption before the last validation costs that validation only
    student = work_dir / 'retinanet_r18-eighth_shapes'
    (student / 'result.json').unlink()
    for log in student.glob('*/vis_data'):
        shutil.rmtree(log)
    run_tool('demo.py', *options)
    assert json.loads((work_dir / 'table.json').read_text())[1]['mAP'] == rows[1]['mAP']
    assert len(list(student.glob('*/vis_data'))) == 1 and (student / 'tested').is_dir()

    done = run_tool('demo.py', *options[:4], '--epochs', 2, check=False)
    assert done.returncode == 1 and 'was made with other settings' in done.stdout


@pytest.mark.slow
def test_a_trained_teacher_is_tested_only(tmp_path, monkeypatch):
    write_split = load_tool('dataset_converters/make_shapes.py').write_split
    for split in ('train', 'val'):
        write_split(tmp_path / 'data', split, 16, 128, 7)
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--work-dir', str(tmp_path), '--data', str(tmp_path / 'data')])
    demo = load_tool('demo.py')
    args, task = demo.parse_args(), demo.TASKS['detection']
    config = demo.ROOT / 'configs' / 'shapes' / task.runs['teacher']
    row = demo.train(task, config, tmp_path / config.stem, args)
    assert row['mAP'] > 0.15 and row['seconds'] is None
    assert not list((tmp_path / config.stem).glob('*.pth'))
    # what the distilled students are given
    assert demo.trained_weights(config, args) == str(config.with_suffix('.pth'))
    for option in (['--train-teacher'], ['--epochs', '1'], ['--cfg-options', 'train_dataloader.batch_size=2']):
        monkeypatch.setattr(sys, 'argv', ['demo.py', *option])
        assert not demo.trained_weights(config, demo.parse_args())


@pytest.mark.slow
def test_classification(tmp_path):
    data = tmp_path / 'data'
    run_tool('dataset_converters/make_shape_classes.py', data, '--train', 10, '--val', 5, '--size', 32)
    options = ('--work-dir', tmp_path, '--data', data, '--epochs', 1, '--cfg-options', 'train_dataloader.batch_size=5')
    done = run_tool('demo.py', 'classification', *options)
    check(tmp_path, done.stdout, 'top-1', ('teacher', 'student alone', 'student, plain MSE and KL', 'student, DiffKD'))
    assert 'top-1 on 5 generated images' in done.stdout and 'plain mmpretrain' in done.stdout


@pytest.mark.slow
def test_segmentation(tmp_path):
    """The schedule counts iterations, and what is reported is the mIoU on test."""
    data = tmp_path / 'data'
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for kind, suffix, shape, high in (('img_dir', 'jpg', (48, 64, 3), 256), ('ann_dir', 'png', (48, 64), 11)):
            (data / kind / split).mkdir(parents=True)
            for name in ('a', 'b'):
                image = rng.integers(0, high, shape, dtype=np.uint8)
                cv2.imwrite(str(data / kind / split / f'{name}.{suffix}'), image)
    iters = ('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'param_scheduler=[]', 'train_dataloader.batch_size=2')
    options = ('--work-dir', tmp_path, '--cfg-options', *iters)
    done = run_tool('demo.py', 'segmentation', '--data', data, *options)
    check(tmp_path, done.stdout, 'mIoU', ('teacher', 'student alone', 'student, plain DIST', 'student, DiffKD'))
    assert 'mIoU on 2 test images' in done.stdout and 'plain mmseg' in done.stdout
    assert (tmp_path / 'deeplabv3_r18-half_camvid' / 'tested').is_dir()

    done = run_tool('demo.py', 'segmentation', '--data', tmp_path / 'nowhere', *options, check=False)
    assert done.returncode == 1 and 'tools/dataset_converters/camvid.py' in done.stdout


def check(work_dir, output, metric, names):
    rows = json.loads((work_dir / 'table.json').read_text())
    assert tuple(row['name'] for row in rows[:-1]) == names
    assert rows[-1][metric] == rows[-2][metric] and (work_dir / 'student.pth').is_file()
    assert rows[0]['params'] > 3 * rows[1]['params'] and rows[1]['flops'] == rows[-1]['flops']
    assert all(f'| {row["name"]} | {row[metric]:.1f} |' in output for row in rows)
