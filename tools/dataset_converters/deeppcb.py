"""Convert the public DeepPCB download to COCO format.

The folder ``PCBData`` of the download (github.com/tangsanli5201/DeepPCB) has the lists ``trainval.txt`` and
``test.txt``. There is no official validation split: every tenth image of ``trainval`` goes to ``val``, the rest to
``train``.
"""

import argparse
import json
from pathlib import Path

import cv2

from mmdiffkd.cli import exit_on_mistake

CLASSES = ('open', 'short', 'mousebite', 'spur', 'copper', 'pin-hole')
# image to leave out, because boxes and class names are drawn into it
BROKEN = {'44000020'}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path, help='folder PCBData of the download')
    parser.add_argument('out', type=Path, help='folder to write images/ and annotations/ to')
    parser.add_argument('--size', type=int, default=320, help='height and width of the images (640 in the download)')
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake():
        convert(args.source, args.out, args.size)


def convert(source: Path, out: Path, size: int) -> None:
    """Write ``images/{trainval,test}`` and ``annotations/{trainval,train,val,test}.json``."""
    for name in ('trainval', 'test'):
        records = [read_image(source, line, name, out, size) for line in read_list(source / f'{name}.txt')]
        write_annotations(out, name, records)
        if name == 'trainval':
            held_out = records[9::10]
            write_annotations(out, 'val', held_out)
            write_annotations(out, 'train', [record for record in records if record not in held_out])


def read_list(file: Path) -> list:
    """Return pairs of image and annotation paths."""
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist; give the folder PCBData of the DeepPCB download.')
    lines = [line.split() for line in file.read_text('utf-8').splitlines() if line.strip()]
    return [line for line in lines if Path(line[0]).stem not in BROKEN]


def read_image(source: Path, paths: list, split: str, out: Path, size: int) -> tuple:
    """Resize and write an image.

    Returns:
        tuple: COCO entry of the image and list of COCO annotations, without ids.
    """
    stem = Path(paths[0]).stem
    # the lists name NAME.jpg; the tested board is NAME_test.jpg, its template NAME_temp.jpg
    file = (source / paths[0]).with_name(f'{stem}_test.jpg')
    image = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise FileNotFoundError(f'{file} does not exist or is not an image; the download is incomplete.')
    height, width = image.shape
    target = out / 'images' / split / f'{stem}.jpg'
    target.parent.mkdir(parents=True, exist_ok=True)
    resized = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(target), resized, [cv2.IMWRITE_JPEG_QUALITY, 90])
    entry = dict(file_name=f'{split}/{stem}.jpg', width=size, height=size, orig_width=width, orig_height=height)
    boxes = []
    for line in (source / paths[1]).read_text('utf-8').splitlines():
        if line.strip():
            x1, y1, x2, y2, category = map(int, line.split())
            boxes.append(box_entry(x1, y1, x2, y2, category, size / width, size / height))
    return entry, boxes


def box_entry(x1: int, y1: int, x2: int, y2: int, category: int, scale_x: float, scale_y: float) -> dict:
    """Return a COCO annotation in pixels of the resized image."""
    if not 1 <= category <= len(CLASSES):
        raise ValueError(f'Class {category} is unknown; DeepPCB has the classes 1 - {len(CLASSES)}.')
    width, height = (x2 - x1) * scale_x, (y2 - y1) * scale_y
    return dict(category_id=category, bbox=[x1 * scale_x, y1 * scale_y, width, height], area=width * height, iscrowd=0)


def write_annotations(out: Path, name: str, records: list) -> None:
    """Number images and boxes from 1 and write one COCO file."""
    images, annotations = [], []
    for image_id, (entry, boxes) in enumerate(records, 1):
        images.append(dict(id=image_id, **entry))
        for box in boxes:
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **box))
    categories = [dict(id=number, name=label) for number, label in enumerate(CLASSES, 1)]
    file = out / 'annotations' / f'{name}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)), encoding='utf-8')
    print(f'{file}: {len(images)} images, {len(annotations)} boxes')


if __name__ == '__main__':
    main()
