"""Draw the ground truth and the detections of one or more detectors for the first images of a test set."""

import argparse

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.visualization import Visualizer

from mmdiffkd.cli import exit_on_mistake, quiet_packages

with quiet_packages():
    from mmdet.apis import inference_detector, init_detector

GROUND_TRUTH, DETECTED = (60, 200, 60), (255, 140, 0)
LABEL_HEIGHT = 28  # pixels


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', help='picture file to write')
    parser.add_argument(
        '--model',
        action='append',
        nargs=3,
        required=True,
        metavar=('NAME', 'CONFIG', 'CHECKPOINT'),
        help='a detector, shown as a row with this name; repeat the option for more detectors. The config of the '
        'last detector defines the test set',
    )
    parser.add_argument('--images', type=int, default=6, help='number of images (default: 6)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='minimum score of detections (default: 0.3)')
    parser.add_argument('--scale', type=int, default=2, help='enlarge the images by this factor (default: 2)')
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake(), quiet_packages():
        draw(args)
    print(f'{args.out}: a row with the ground truth, then a row per model with its detections above {args.score_thr}')


def draw(args: argparse.Namespace) -> None:
    """Draw the rows of the picture, and write it to a file."""
    cfg = Config.fromfile(args.model[-1][1])
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = dataset.metainfo['classes']
    infos = [dataset.get_data_info(index) for index in range(min(args.images, len(dataset)))]
    images = [read_image(info['img_path'], args.scale) for info in infos]
    truth = [[(box['bbox'], classes[box['bbox_label']]) for box in info['instances']] for info in infos]
    rows = [draw_row('ground truth', images, truth, GROUND_TRUTH, args.scale)]
    for name, config, checkpoint in args.model:
        model = init_detector(config, checkpoint, device='cpu', cfg_options={})
        boxes = [detect(model, info['img_path'], classes, args.score_thr) for info in infos]
        rows.append(draw_row(name, images, boxes, DETECTED, args.scale))
    cv2.imwrite(args.out, np.vstack(rows)[..., ::-1])


def read_image(path: str, scale: int) -> np.ndarray:
    """Read and enlarge an RGB image, (H, W, 3)."""
    return cv2.resize(cv2.imread(path)[..., ::-1], None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def detect(model, path: str, classes: tuple, score_thr: float) -> list:
    """Return boxes (x1, y1, x2, y2) and labels, sorted by score, so that the highest score is drawn on top."""
    found = inference_detector(model, path).pred_instances
    found = found[found.scores > score_thr]
    found = found[found.scores.argsort()].numpy()
    return [
        (box, f'{classes[label]} {score:.2f}') for box, label, score in zip(found.bboxes, found.labels, found.scores)
    ]


def draw_row(name: str, images: list, boxes: list, color: tuple, scale: int) -> np.ndarray:
    """Draw images with their boxes side by side, below a name."""
    row = np.hstack([draw_boxes(*image_and_boxes, color, scale) for image_and_boxes in zip(images, boxes)])
    label = np.full((LABEL_HEIGHT, row.shape[1], 3), 255, np.uint8)
    cv2.putText(label, name, (6, LABEL_HEIGHT - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([label, row])


def draw_boxes(image: np.ndarray, boxes: list, color: tuple, scale: int) -> np.ndarray:
    """Draw labeled boxes on a copy of an image. Boxes are (x1, y1, x2, y2) in pixels of the original, smaller image."""
    visualizer = Visualizer(image=image)
    for box, label in boxes:
        corners = np.asarray(box, dtype=float) * scale
        visualizer.draw_bboxes(corners[None], edge_colors=color, line_widths=2)
        visualizer.draw_texts(
            label,
            corners[None, :2] + 2,
            font_sizes=8,
            colors='white',
            bboxes=dict(facecolor='black', alpha=0.6, pad=1, edgecolor='none'),
        )
    return visualizer.get_image()


if __name__ == '__main__':
    main()
