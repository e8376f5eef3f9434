import json
import shutil

import cv2
import pytest

from tests.conftest import run_tool


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
