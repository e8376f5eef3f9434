"""Picture of a comparison."""

import cv2
import pytest

from mmdiffkd.visualization.comparison import draw_comparison
from mmdiffkd.visualization.runs import read_groups
from tests.test_visualization import logs

METRIC = 'coco/bbox_mAP'
ALONE = {0: 0.20, 1: 0.24, 2: 0.25}
CWD = {0: 0.25, 1: 0.27, 2: 0.31}
PKD = {0: 0.24, 1: 0.28, 2: 0.30}


@pytest.mark.parametrize('validations', [1, 3])
def test_picture(tmp_path, validations):
    """Several validations add learning curves."""
    values, named = dict(alone=ALONE, cwd=CWD), []
    for name in values:
        for seed, value in values[name].items():
            records = [r for i in range(1, validations + 1) for r in (logs.train(i), logs.val(i, value * i))]
            named.append((name, logs.write(tmp_path / f'{name}{seed}', records)))
    draw_comparison(tmp_path / 'out.png', METRIC, 'val', values, read_groups(named))
    height, width, _ = cv2.imread(str(tmp_path / 'out.png')).shape
    assert (width > 2.5 * height) == (validations > 1)
