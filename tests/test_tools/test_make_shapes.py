import json

import numpy as np
from mmdet.datasets import CocoDataset
from mmengine.config import Config

from tests.conftest import ROOT, call_tool, load_tool


def test_images_and_boxes_are_the_same_for_a_seed(tmp_path):
    for name in ('a', 'b'):
        call_tool('dataset_converters/make_shapes.py', tmp_path / name, '--train', 3, '--val', 2, '--size', 96)
    files = sorted(path.relative_to(tmp_path / 'a') for path in (tmp_path / 'a').rglob('*') if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()


def test_masks_cover_only_visible_pixels():
    make_shapes = load_tool('dataset_converters/make_shapes.py')
    image, objects = make_shapes.draw_image(np.random.default_rng(0), 96)
    assert image.shape == (96, 96, 3) and image.std() > 5
    assert objects
    for (name, mask), (_, later) in zip(objects, objects[1:]):
        assert name in make_shapes.SHAPES
        assert not (mask & later).any()


def test_labels_agree_in_coco_and_demo_configs(shapes):
    """``CocoDataset`` numbers classes in the order of the file and ignores the order in its metainfo."""
    make_shapes = load_tool('dataset_converters/make_shapes.py')
    file = json.loads((shapes / 'annotations' / 'train.json').read_text())
    names = [category['name'] for category in file['categories']]
    assert tuple(names) == CocoDataset.METAINFO['classes']
    in_file = tuple(name for name in names if name in make_shapes.SHAPES)
    assert Config.fromfile(ROOT / 'configs' / '_base_' / 'shapes.py').metainfo.classes == in_file
    assert {names[box['category_id'] - 1] for box in file['annotations']} <= set(in_file)
