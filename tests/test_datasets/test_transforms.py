import numpy as np
import pytest

from mmdiffkd.datasets import PackImage, RandomResizedCrop


@pytest.fixture
def image():
    """An image whose two channels are the coordinates of its pixels."""
    return np.stack(np.meshgrid(np.arange(200.0), np.arange(100.0)), -1).astype(np.float32)


def test_crops_are_parts_of_the_image(image):
    np.random.seed(0)
    areas, ratios = [], []
    for _ in range(100):
        crop = RandomResizedCrop(scale=(40, 20), crop_ratio_range=(0.25, 0.5))(dict(img=image))['img']
        assert crop.shape == (20, 40, 2) and crop.min() >= 0
        width, height = ((crop[-1, -1] - crop[0, 0]) * (40 / 39, 20 / 19)).tolist()
        areas.append(width * height / image[..., 0].size)
        ratios.append(width / height)
    assert 0.22 < min(areas) < 0.3 and 0.45 < max(areas) < 0.55
    assert 0.7 < min(ratios) < 0.9 and 1.15 < max(ratios) < 1.45


def test_images_that_no_crop_fits_are_taken_whole(image):
    crop = RandomResizedCrop(scale=10, crop_ratio_range=(1, 1))(dict(img=image))['img']  # an aspect ratio of 2
    assert crop.shape == (10, 10, 2) and crop[..., 0].max() > 180 and crop[..., 1].max() > 90


def test_gray_images_get_a_channel():
    assert PackImage()(dict(img=np.zeros((4, 6), np.uint8)))['inputs'].shape == (1, 4, 6)
