"""Folders with images of all kinds, broken files and folders without images."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader

from mmdiffkd.datasets import ImageFolders, LoadImage

PIPELINE = [dict(type='mmdiffkd.LoadImage'), dict(type='mmdiffkd.RandomResizedCrop', scale=32), dict(type='PackImage')]
PIPELINE[-1]['type'] = 'mmdiffkd.PackImage'


@pytest.fixture
def pixels():
    """A gray ramp, which all formats can store."""
    return np.linspace(0, 255, 48, dtype=np.uint8)[None].repeat(40, 0)


@pytest.fixture
def folder(tmp_path, pixels):
    root = tmp_path / 'images'
    (root / 'a' / 'b').mkdir(parents=True)
    color = Image.fromarray(pixels).convert('RGB')
    color.save(root / 'rgb.png')
    color.convert('CMYK').save(root / 'a' / 'cmyk.JPG', quality=100)
    color.convert('RGBA').save(root / 'a' / 'rgba.png')
    color.quantize(256).save(root / 'a' / 'palette.png')
    Image.fromarray(pixels).save(root / 'a' / 'b' / 'gray.tiff')
    Image.fromarray(pixels.astype(np.uint16) * 257).save(root / 'a' / 'b' / 'deep.png')
    return root


def build(*folders, **options):
    return DATASETS.build(
        dict(type='mmdiffkd.ImageFolders', folders=list(map(str, folders)), pipeline=PIPELINE, **options)
    )


def test_all_formats_become_color_images(folder, pixels):
    dataset = build(folder)
    files = [dataset.get_data_info(index)['img_path'] for index in range(len(dataset))]
    names = [file.rpartition('/')[2] for file in files]
    assert names == ['rgb.png', 'cmyk.JPG', 'palette.png', 'rgba.png', 'deep.png', 'gray.tiff']
    for file in files:
        image = LoadImage()(dict(img_path=file))['img']
        assert image.dtype == np.uint8
        np.testing.assert_allclose(image, pixels[..., None].repeat(3, 2), atol=3, err_msg=file)
    gray = LoadImage(color_type='grayscale')(dict(img_path=files[0]))['img']
    np.testing.assert_allclose(gray, pixels, atol=1)


def test_items_are_images_of_one_size(folder):
    batch = next(iter(DataLoader(build(folder), batch_size=6)))
    assert batch.keys() == {'inputs'} and batch['inputs'].shape == (6, 3, 32, 32)
    assert batch['inputs'].dtype == torch.uint8


def test_files_that_are_no_images_are_left_out(folder, capfd):
    (folder / 'empty.jpg').touch()
    (folder / 'page.jpg').write_text('<html>')
    (folder / 'notes.txt').write_text('not counted')
    (folder / '.hidden.png').write_bytes((folder / 'rgb.png').read_bytes())
    (folder / 'a' / 'loop').symlink_to(folder)
    assert len(build(folder)) == 6
    log = capfd.readouterr().out
    assert "6 images in '" in log and 'Skipped 2 files that are no images, such as ' in log


@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_files_are_replaced_and_counted(folder, workers):
    damaged = folder / 'damaged.png'
    damaged.write_bytes((folder / 'rgb.png').read_bytes()[:60])
    dataset = build(folder)
    assert len(dataset) == 7 and dataset.broken_files == []
    batches = list(DataLoader(dataset, batch_size=7, num_workers=workers))
    assert batches[0]['inputs'].shape == (7, 3, 32, 32)
    assert dataset.broken_files == [str(damaged)]


def test_several_folders_and_copies(folder):
    dataset = build(folder / 'a', folder / 'a' / 'b')
    assert len(dataset) == 5 + 2
    assert len(pickle.loads(pickle.dumps(dataset))) == 7


def test_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="The folder '.*absent' does not exist"):
        build(tmp_path / 'absent')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match="No images in '.*empty': .* and there are no such files"):
        build(tmp_path / 'empty')
    (tmp_path / 'empty' / 'broken.png').touch()
    with pytest.raises(ValueError, match='all 1 files with these suffixes are damaged'):
        build(tmp_path / 'empty')
    with pytest.raises(ValueError, match='folders=3 must be'):
        ImageFolders(folders=3)
