"""Generate a small seeded classification data set: crops around the shapes of make_shapes.py.

Each crop is centered on one object and resized to the image size. Neighboring and occluding objects remain visible.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from make_shapes import SHAPES, SPLITS, draw_image

IMAGE_SIZE = 128  # pixels; size of the image that a crop is taken from


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write <split>/<class>/*.png and classes.txt to')
    parser.add_argument('--train', type=int, default=2000, help='number of training images')
    parser.add_argument('--val', type=int, default=1000, help='number of validation images')
    parser.add_argument('--size', type=int, default=64, help='height and width of the images in pixels')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    return parser.parse_args()


def main():
    args = parse_args()
    for split, count in zip(SPLITS, (args.train, args.val)):
        write_split(args.out / split, split, count, args.size, args.seed)
    (args.out / 'classes.txt').write_text(''.join(f'{name}\n' for name in sorted(SHAPES)), encoding='utf-8')
    print(f'{args.out}: images of {len(SHAPES)} classes, {args.train} in train, {args.val} in val')


def write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write the images of a split to ``<class>/*.png``."""
    for name in SHAPES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        # one generator per image: the first n images do not depend on the total number
        rng, name = np.random.default_rng([seed, SPLITS.index(split), index]), SHAPES[index % len(SHAPES)]
        cv2.imwrite(str(folder / name / f'{index:05d}.png'), draw_window(rng, name, size))


def draw_window(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """Draw one image (size, size, 3) with a shape of the given name at its center."""
    masks = []
    while not masks:
        image, objects = draw_image(rng, IMAGE_SIZE)
        masks = [mask for other, mask in objects if other == name]
    mask = masks[rng.integers(len(masks))]
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    side = max(width, height) * rng.uniform(1.1, 1.5)
    left, top = x + (width - side) / 2, y + (height - side) / 2
    zoom = np.array([[1, 0, -left], [0, 1, -top]]) * size / side
    return cv2.warpAffine(image, zoom, (size, size), borderMode=cv2.BORDER_REFLECT_101)


if __name__ == '__main__':
    main()
