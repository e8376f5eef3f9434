"""Generate a small seeded detection data set in COCO format: textured shapes with occlusion and clutter.

The shapes are named after COCO categories that look similar, and the annotation files list all 80 COCO categories, so
that COCO configs work without changes.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from mmdiffkd.cli import quiet_packages

with quiet_packages():
    from mmdet.datasets import CocoDataset

SHAPES = ('stop sign', 'sports ball', 'kite', 'pizza', 'donut')
CATEGORIES = CocoDataset.METAINFO['classes']
SPLITS = ('train', 'val')
MIN_VISIBLE = 0.4  # objects with a smaller visible fraction are not annotated
MIN_SIDE = 6  # pixels; smaller objects are not annotated
RADII = (0.08, 0.22)  # range of the radius relative to the image size


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write images/ and annotations/ to')
    parser.add_argument('--train', type=int, default=600, help='number of training images')
    parser.add_argument('--val', type=int, default=200, help='number of validation images')
    parser.add_argument('--size', type=int, default=128, help='height and width of the images in pixels')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    return parser.parse_args()


def main():
    args = parse_args()
    for split, count in zip(SPLITS, (args.train, args.val)):
        write_split(args.out, split, count, args.size, args.seed)
    print(f'{args.out}: images with boxes, {args.train} in train, {args.val} in val')


def write_split(out: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write ``images/<split>/*.png`` and ``annotations/<split>.json``."""
    folder = out / 'images' / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        # one generator per image: the first n images do not depend on the total number
        image, objects = draw_image(np.random.default_rng([seed, SPLITS.index(split), index]), size)
        name = f'{index:05d}.png'
        cv2.imwrite(str(folder / name), image)
        images.append(dict(id=index, file_name=name, height=size, width=size))
        for category, mask in objects:
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            annotations.append(
                dict(
                    id=len(annotations),
                    image_id=index,
                    category_id=CATEGORIES.index(category) + 1,
                    bbox=[x, y, w, h],
                    area=int(mask.sum()),
                    iscrowd=0,
                )
            )
    categories = [dict(id=number, name=name) for number, name in enumerate(CATEGORIES, 1)]
    file = out / 'annotations' / f'{split}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)), encoding='utf-8')


def draw_image(rng: np.random.Generator, size: int):
    """Draw one image.

    Returns:
        tuple: Image (size, size, 3) and list of (category, mask of the visible part).
    """
    image = texture(rng, size, contrast=40)
    draw_clutter(rng, image)
    masks, names = [], []
    for _ in range(rng.integers(2, 6)):
        name = str(rng.choice(SHAPES))
        mask = shape_mask(rng, name, size)
        fill = texture(rng, size, contrast=60)
        shade = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7)[..., None]
        image = (fill * shade + image * (1 - shade)).astype(np.uint8)
        masks = [(visible & ~mask, area) for visible, area in masks] + [(mask, mask.sum())]
        names.append(name)
    noise = rng.normal(0, 6, image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    objects = []
    for name, (visible, area) in zip(names, masks):
        height, width = (np.ptp(axis) + 1 if len(axis) else 0 for axis in visible.nonzero())
        if area and visible.sum() >= MIN_VISIBLE * area and min(height, width) >= MIN_SIDE:
            objects.append((name, visible))
    return image, objects


def shape_mask(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """Draw the mask (size, size) of a shape with random position, size and angle, possibly partly outside the image."""
    radius = np.exp(rng.uniform(*np.log(RADII))) * size
    center = rng.uniform(0.05, 0.95, 2) * size
    aspect, angle = rng.uniform(0.75, 1.0), rng.uniform(0, 2 * np.pi)
    mask = np.zeros((size, size), np.uint8)
    if name in ('sports ball', 'donut'):
        axes = (radius, radius * aspect)
        cv2.ellipse(mask, (tuple(center), tuple(2 * a for a in axes), float(np.degrees(angle))), 1, -1)
        if name == 'donut':
            cv2.ellipse(mask, (tuple(center), tuple(0.9 * a for a in axes), float(np.degrees(angle))), 0, -1)
        return mask.astype(bool)
    corners = dict(
        kite=[(0, -1.2), (0.7, -0.2), (0, 1.2), (-0.7, -0.2)],
        pizza=[(0, -1.1), (0.8, 0.9), (0, 1.1), (-0.8, 0.9)],
    )
    if name == 'stop sign':
        turns = np.pi / 8 + np.arange(8) * np.pi / 4
        points = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    else:
        points = np.array(corners[name])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (points * radius * [aspect, 1]) @ rotation.T + center
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
    return mask.astype(bool)


def texture(rng: np.random.Generator, size: int, contrast: float) -> np.ndarray:
    """Draw a colored pattern (size, size, 3): clouds, stripes or a checkerboard."""
    kind = rng.integers(3)
    ys, xs = np.mgrid[:size, :size]
    if kind == 0:
        coarse = rng.normal(0, 1, (size // 16 + 1, size // 16 + 1)).astype(np.float32)
        pattern = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    else:
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 20)
        pattern = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * 2 * np.pi / period)
        if kind == 2:
            pattern = pattern * np.sin((ys * np.cos(angle) - xs * np.sin(angle)) * 2 * np.pi / period)
    color = rng.uniform(40, 215, 3)
    tint = rng.uniform(0.3, 1, 3)
    return np.clip(color + contrast * pattern[..., None] * tint, 0, 255).astype(np.uint8)


def draw_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw lines and small dots as clutter, which is not annotated."""
    size = image.shape[0]
    for _ in range(rng.integers(3, 10)):
        start, end = (tuple(int(v) for v in rng.integers(0, size, 2)) for _ in range(2))
        cv2.line(image, start, end, tuple(map(float, rng.uniform(0, 255, 3))), int(rng.integers(1, 3)), cv2.LINE_AA)
    for _ in range(rng.integers(3, 10)):
        center = tuple(int(v) for v in rng.integers(0, size, 2))
        cv2.circle(image, center, int(rng.integers(1, 3)), tuple(map(float, rng.uniform(0, 255, 3))), -1, cv2.LINE_AA)


if __name__ == '__main__':
    main()
