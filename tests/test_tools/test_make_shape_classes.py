import cv2
import pytest
from mmengine.config import Config
from mmpretrain.datasets import CustomDataset

from tests.conftest import ROOT, call_tool


def make(out):
    call_tool('dataset_converters/make_shape_classes.py', out, '--train', 7, '--val', 5, '--size', 32)
    return out


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make(tmp_path_factory.mktemp('shape_classes'))


def test_images_are_the_same_for_a_seed(data, tmp_path):
    files = [{p.relative_to(out): p.read_bytes() for p in out.rglob('*.*')} for out in (data, make(tmp_path))]
    assert len(files[0]) == 13  # twelve images and the list of classes
    assert files[0] == files[1]


def test_mmpretrain_reads_the_data_set(data):
    """``CustomDataset`` numbers classes in the order of their folders and ignores the order in its metainfo."""
    classes = Config.fromfile(ROOT / 'configs' / '_base_' / 'shape_classes.py').metainfo.classes
    assert (data / 'classes.txt').read_text().splitlines() == list(classes)
    for split, count in (('train', 7), ('val', 5)):
        dataset = CustomDataset(data_root=str(data), data_prefix=split, metainfo=dict(classes=classes))
        assert len(dataset) == count
        for index in range(count):
            info = dataset.get_data_info(index)
            assert classes[info['gt_label']] in info['img_path']
            image = cv2.imread(info['img_path'])
            assert image.shape == (32, 32, 3) and image.std() > 5
