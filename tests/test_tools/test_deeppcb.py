import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from tests import tiny
from tests.conftest import ROOT, call_tool

# Folder of the converted data set. Next to it, ``raw_layout_samples`` has a few files of the original download. The
# repository does not contain the data.
DATA = Path(os.environ.get('MMDIFFKD_DEEPPCB', ROOT / 'data' / 'deeppcb_coco320'))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason='set MMDIFFKD_DEEPPCB to the converted DeepPCB set')


def download(folder, count=12):
    """Write a folder like the public download, with generated boards."""
    rng = np.random.default_rng(0)
    images, boxes = folder / 'group1' / '1', folder / 'group1' / '1_not'
    images.mkdir(parents=True)
    boxes.mkdir()
    lines = []
    for number in range(count):
        name = f'{number:08d}'
        board = rng.integers(0, 2, (20, 20), dtype=np.uint8) * 255
        board = cv2.resize(board, (640, 640), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(images / f'{name}_test.jpg'), board)
        (boxes / f'{name}.txt').write_text('100 50 131 90 3\n10 20 30 40 6\n')
        lines.append(f'group1/1/{name}.jpg group1/1_not/{name}.txt\n')
    (folder / 'trainval.txt').write_text(''.join(lines))
    (folder / 'test.txt').write_text(''.join(lines[:2]) + 'group1/1/44000020.jpg group1/1_not/44000020.txt\n')
    return folder


def read(out, name):
    return json.loads((out / 'annotations' / f'{name}.json').read_text())


def test_converter(tmp_path):
    source, out = download(tmp_path / 'PCBData'), tmp_path / 'out'
    call_tool('dataset_converters/deeppcb.py', source, out, '--size', 160)
    sizes = {name: len(read(out, name)['images']) for name in ('trainval', 'train', 'val', 'test')}
    assert sizes == dict(trainval=12, train=11, val=1, test=2)  # the broken image is left out
    content = read(out, 'val')
    assert content['images'] == [
        dict(id=1, file_name='trainval/00000009.jpg', width=160, height=160, orig_width=640, orig_height=640)
    ]
    box = content['annotations'][0]
    assert box == dict(id=1, image_id=1, category_id=3, bbox=[25.0, 12.5, 7.75, 10.0], area=77.5, iscrowd=0)
    image = cv2.imread(str(out / 'images' / 'trainval' / '00000009.jpg'), cv2.IMREAD_UNCHANGED)
    assert image.shape == (160, 160)


def test_incomplete_download(tmp_path):
    done = call_tool('dataset_converters/deeppcb.py', tmp_path, tmp_path / 'out', check=False)
    assert done.returncode == 2 and 'give the folder PCBData of the DeepPCB download' in done.stdout
    source = download(tmp_path / 'PCBData')
    (source / 'group1' / '1' / '00000003_test.jpg').unlink()
    done = call_tool('dataset_converters/deeppcb.py', source, tmp_path / 'out', check=False)
    assert done.returncode == 2 and '00000003_test.jpg does not exist or is not an image' in done.stdout


@needs_data
@pytest.mark.skipif(not (DATA.parent / 'raw_layout_samples').is_dir(), reason='no files of the download')
def test_converter_reproduces_the_set(tmp_path):
    """On files of the real download, boxes are equal, and pixels differ only by the JPEG encoder."""
    call_tool('dataset_converters/deeppcb.py', DATA.parent / 'raw_layout_samples' / 'deeppcb' / 'PCBData', tmp_path)
    for name in ('trainval', 'test'):
        found, expected = read(tmp_path, name), read(DATA, name)
        by_file = {image['file_name']: image for image in expected['images']}
        compared = 0
        for image in found['images']:
            if image['file_name'] not in by_file:  # the lists of the few files differ from the official split
                continue
            twin = by_file[image['file_name']]
            boxes = [
                [(a['bbox'], a['category_id'], a['area']) for a in content['annotations'] if a['image_id'] == i['id']]
                for content, i in ((found, image), (expected, twin))
            ]
            assert boxes[0] == boxes[1]
            pixels = [cv2.imread(str(folder / 'images' / image['file_name']), 0) for folder in (tmp_path, DATA)]
            assert np.abs(pixels[0].astype(int) - pixels[1]).mean() < 1
            compared += 1
        assert compared, name


@needs_data
@pytest.mark.slow
def test_short_run_on_real_images(tmp_path):
    """Run the shipped config on the real data for one epoch of two iterations and a validation."""
    config = ROOT / 'configs' / 'deeppcb' / 'diffkd_retinanet-r50_retinanet-r18_24e_deeppcb.py'
    from mmdiffkd.utils import get_model_cfg, resolve_config

    teacher = resolve_config(Config.fromfile(config).model.teacher.config)
    checkpoint = tiny.write_checkpoint(get_model_cfg(teacher), tmp_path / 'teacher.pth')
    loaders = [f'{split}_dataloader' for split in ('train', 'val', 'test')]
    options = [f'{loader}.dataset.data_root={DATA}/' for loader in loaders]
    options += [f'{loader}.{key}' for loader in loaders for key in ('num_workers=0', 'persistent_workers=False')]
    call_tool(
        'train.py',
        config,
        '--work-dir',
        tmp_path / 'run',
        '--cfg-options',
        *options,
        f'val_evaluator.ann_file={DATA}/annotations/val.json',
        f'test_evaluator.ann_file={DATA}/annotations/test.json',
        f'model.teacher.checkpoint={checkpoint}',
        'model.student.test_cfg.score_thr=0.0',
        'train_dataloader.batch_size=2',
        'train_dataloader.dataset.indices=4',
        'val_dataloader.dataset.indices=4',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=1',
    )
    (log,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record['diffkd.fpn.loss_kd'] > 0 for record in records[:2]] == [True, True]
    assert 'coco/bbox_mAP' in records[-1]
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()
