import pytest

from mmdiffkd.utils import zoo_checkpoint

RETINANET = 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'


def test_zoo_checkpoint():
    assert zoo_checkpoint(RETINANET).endswith('/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth')


@pytest.mark.parametrize(
    'source, message',
    [
        ('retinanet.py', "needs a config of an installed package.*not 'retinanet.py'"),
        (dict(), 'not a dict;'),
        ('mmdet::retinanet/mine.py', 'model index lists no weights for mmdet::retinanet/mine.py'),
    ],
)
def test_zoo_checkpoint_is_missing(source, message):
    with pytest.raises(ValueError, match=message):
        zoo_checkpoint(source)
