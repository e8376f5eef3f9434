"""Paint a detector's detections beside the ground truth, on the first images of its test set."""

import argparse

import cv2
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.visualization import Visualizer

GROUND_TRUTH, DETECTED = (60, 200, 60), (255, 140, 0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of a detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='picture to write')
    parser.add_argument('--images', type=int, default=6)
    parser.add_argument('--score-thr', type=float, default=0.4)
    parser.add_argument('--scale', type=int, default=2, help='enlargement of the images')
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.default_scope)
    model = init_detector(cfg, args.checkpoint, device='cpu', cfg_options={})
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = dataset.metainfo['classes']
    columns = []
    for index in range(min(args.images, len(dataset))):
        info = dataset.get_data_info(index)
        image = cv2.imread(info['img_path'])[..., ::-1]
        image = cv2.resize(image, None, fx=args.scale, fy=args.scale, interpolation=cv2.INTER_CUBIC)
        truth = [(box['bbox'], classes[box['bbox_label']]) for box in info['instances']]
        found = inference_detector(model, info['img_path']).pred_instances
        found = found[found.scores > args.score_thr].numpy()
        boxes = [
            (box, f'{classes[label]} {score:.2f}')
            for box, label, score in zip(found.bboxes, found.labels, found.scores)
        ]
        columns.append(np.vstack([paint(image, truth, GROUND_TRUTH, args), paint(image, boxes, DETECTED, args)]))
    cv2.imwrite(args.out, np.hstack(columns)[..., ::-1])
    print(f'{args.out}: ground truth above, detections with a score over {args.score_thr} below')


def paint(image: np.ndarray, boxes: list, colour: tuple, args) -> np.ndarray:
    """A copy of the image with boxes (x1, y1, x2, y2) in pixels of the original and their labels."""
    visualizer = Visualizer(image=image)
    for box, label in boxes:
        corners = np.asarray(box, dtype=float) * args.scale
        visualizer.draw_bboxes(corners[None], edge_colors=colour, line_widths=2)
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
