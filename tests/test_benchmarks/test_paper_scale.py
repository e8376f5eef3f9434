from pathlib import Path

import pytest
from mmengine.config import Config

from benchmarks.iteration import random_batch_of
from benchmarks.paper_scale import BATCHES, PAIRS, SIZES, schedule_of, write_page
from tests.conftest import ROOT


def test_every_config_exists_and_is_measured():
    measured = {pair.config for pair in PAIRS if pair.same_as is None}
    for pair in PAIRS:
        assert (ROOT / 'configs' / f'{pair.config}.py').exists()
        assert pair.same_as is None or pair.same_as in measured
    attention_configs = {f'coco/{path.stem}' for path in (ROOT / 'configs' / 'coco').glob('diffkd-attention_*.py')}
    assert attention_configs == {pair.config for pair in PAIRS if 'attention' in pair.config}


@pytest.mark.parametrize(
    'config, images, gpus',
    [
        ('coco/diffkd_retinanet-r101_retinanet-r50_2x_coco', 24 * 117266, 8),
        ('cityscapes/diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes', 40000 * 16, 4),
        ('imagenet/diffkd_resnet34_resnet18_100e_in1k', 100 * 1281167, 8),
        ('imagenet/diffkd_swin-l_swin-t_300e_in1k', 300 * 1281167, 16),
    ],
)
def test_schedules(config, images, gpus):
    (pair,) = (pair for pair in PAIRS if pair.config == config)
    cfg = Config.fromfile(ROOT / 'configs' / f'{config}.py')
    assert schedule_of(cfg, pair.data) == dict(images=images, gpus=gpus)


@pytest.mark.parametrize(
    'config',
    [
        'coco/diffkd_retinanet-r101_retinanet-r50_2x_coco',
        'cityscapes/diffkd_deeplabv3-r101_deeplabv3-r18_40k_cityscapes',
    ],
)
def test_image_sizes(config):
    (pair,) = (pair for pair in PAIRS if pair.config == config)
    cfg = Config.fromfile(ROOT / 'configs' / f'{config}.py')
    batch = random_batch_of(cfg, *SIZES[pair.data], BATCHES[pair.data])
    assert {tuple(image.shape[-2:]) for image in batch['inputs']} == {SIZES[pair.data]}
    for sample in batch['data_samples']:
        assert sample.img_shape == SIZES[pair.data]
        if 'gt_sem_seg' in sample:
            assert sample.gt_sem_seg.shape == SIZES[pair.data]


def test_page(tmp_path):
    results = {
        'coco/diffkd_retinanet-r101_retinanet-r50_2x_coco': dict(seconds_an_image=2.0, ratio=1.5, images=86400, gpus=8)
    }
    page = Path(tmp_path) / 'page.md'
    write_page(page, dict(machine='a CPU', versions='versions'), results)
    lines = [line for line in page.read_text().splitlines() if 'dist_train' in line]
    assert len(lines) == 2  # the attention-weighted variant repeats the time
    assert lines[0].endswith('| 37.4 -> 39.7 |  | 0.1 | 2.00 | 1.50 | 2 |')
