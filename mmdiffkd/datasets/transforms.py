"""Transforms of images without labels. Keys and arguments are those of mmcv and mmpretrain."""

import math
from typing import Optional, Sequence, Tuple, Union

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile

from mmdiffkd.registry import TRANSFORMS

ATTEMPTS = 10  # number of random crops to try; if none fits into the image, the whole image is used
LOG_LONGEST = math.log(4 / 3)  # logarithm of the largest width / height of a crop; the smallest is its inverse


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """Load an image as mmcv's ``LoadImageFromFile`` does, but return None if the file cannot be decoded.

    Only ``color_type`` determines the channels. With its default ``'color'``, gray, indexed and CMYK images become BGR,
    and an alpha channel is left out. Values of 16 bits are divided by 256.
    """

    def transform(self, results: dict) -> Optional[dict]:
        """Load the image at ``img_path``."""
        try:
            return super().transform(results)
        except Exception:  # mmcv, OpenCV and file backends raise all kinds of errors
            return None


@TRANSFORMS.register_module()
class RandomResizedCrop(BaseTransform):
    """Crop a random part of an image with a random aspect ratio, 3/4 to 4/3, and resize it.

    mmpretrain has the same transform. This class works without mmpretrain.

    Args:
        scale (int or tuple[int, int]): Width and height of the result.
        crop_ratio_range (tuple[float, float]): Smallest and largest fraction of the image's area. Defaults to
            (0.25, 1.0).
    """

    def __init__(self, scale: Union[int, Sequence[int]], crop_ratio_range: Tuple[float, float] = (0.25, 1.0)):
        self.scale = (scale, scale) if isinstance(scale, int) else tuple(scale)
        self.crop_ratio_range = crop_ratio_range

    def transform(self, results: dict) -> dict:
        """Crop and resize the image."""
        left, top, width, height = self._draw(*results['img'].shape[:2])
        crop = results['img'][top : top + height, left : left + width]
        is_smaller = width * height > self.scale[0] * self.scale[1]
        results['img'] = mmcv.imresize(crop, self.scale, interpolation='area' if is_smaller else 'bilinear')
        results['img_shape'] = results['img'].shape[:2]
        return results

    def _draw(self, height: int, width: int) -> Tuple[int, int, int, int]:
        """Draw left, top, width and height of the crop; the whole image if no crop fits."""
        for _ in range(ATTEMPTS):
            area = np.random.uniform(*self.crop_ratio_range) * height * width
            ratio = math.exp(np.random.uniform(-LOG_LONGEST, LOG_LONGEST))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return np.random.randint(width - w + 1), np.random.randint(height - h + 1), w, h
        return 0, 0, width, height


@TRANSFORMS.register_module()
class PackImage(BaseTransform):
    """Convert an image to ``inputs``, a tensor (C, H, W)."""

    def transform(self, results: dict) -> dict:
        """Return a dict with ``inputs`` only."""
        image = results['img']
        image = image[..., None] if image.ndim == 2 else image
        return dict(inputs=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
