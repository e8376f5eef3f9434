"""Reports on real runs and on written logs."""

import re
from html.parser import HTMLParser

import cv2
import mmdet
import numpy as np
import pytest
from mmengine.runner import Runner

import mmdiffkd
from tests import tiny
from tests.conftest import call_tool
from tests.test_visualization import logs

TOOL = 'analysis_tools/report.py'
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input', 'col'}


class Page(HTMLParser):
    """Content of a page. Asserts that the page is well-formed and loads no external files."""

    def __init__(self, file):
        super().__init__()
        self.open, self.pictures, self.text = [], 0, ''
        self.ids, self.links = set(), set()
        self.source = file.read_text()
        self.feed(self.source)
        assert self.open == [] and self.links <= self.ids

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.pictures += tag == 'img'
        assert tag not in ('script', 'link', 'iframe')
        for name, value in attributes:
            assert name not in ('src', 'href') or value.startswith(('data:image/', '#')), value[:80]
            self.ids |= {f'#{value}'} if name == 'id' else set()
            self.links |= {value} if name == 'href' else set()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != 'style' else ''


def report(*runs, out):
    call_tool(TOOL, *runs, '-o', out)
    page = Page(out / 'report.html')
    assert page.pictures >= len(list(out.glob('*.png'))) > 0
    return page


@pytest.fixture
def run(tmp_path, shapes):
    """Work dir of a real run with visualization and validation."""
    folder = tmp_path / 'run'
    Runner.from_cfg(
        tiny.run_cfg(
            tiny.distiller_cfg(tmp_path),
            shapes,
            folder,
            train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=2),
            param_scheduler=[],
            default_hooks=dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False)),
            log_processor=dict(by_epoch=False),
            custom_hooks=[dict(type='mmdiffkd.DiffKDVisualizationHook'), dict(type='mmdiffkd.TeacherCheckHook')],
            randomness=dict(seed=4),
        )
    ).train()
    return folder


def test_real_run(run, tmp_path):
    page = report(f'small={run}', out=tmp_path / 'out')
    files = {path.name for path in (tmp_path / 'out').iterdir()}
    assert {'report.html', 'loss.png', 'fpn-loss_kd.png', 'fpn-gamma-0.png', 'validation-coco_bbox_mAP.png'} <= files
    for text in ('coco/bbox_mAP', 'gamma', 'small: fpn', 'Level 0, iteration 1', 'error can rise', 'DiffKDDistiller'):
        assert text in page.text, text
    assert re.search(r'The teacher of small, measured before training: coco/bbox_mAP \d\.\d{3}\.', page.text)
    versions = re.search(r'<th>mmdiffkd</th><th>mmdet</th>', page.source)
    assert versions and all(f'<td>{package.__version__}</td>' in page.source for package in (mmdiffkd, mmdet))


def test_seeds_side_by_side(tmp_path):
    for name, values in dict(alone=(0.2, 0.24), DiffKD=(0.3, 0.34)).items():
        for seed, value in enumerate(values):
            records = [logs.train(10), logs.train(20), logs.val(20, value)]
            logs.write(tmp_path / f'{name}{seed}', records)
    runs = [f'{name}={tmp_path}/{name}{seed}' for name in ('alone', 'DiffKD') for seed in (0, 1)]
    page = report(*runs, out=tmp_path / 'out')
    cells = re.sub(r'\s+', ' ', page.text)
    assert '0.220 ± 0.028' in cells and '0.320 ± 0.028' in cells and '+0.100 (+0.100 to +0.100)' in cells


def test_runs_without_a_common_metric(tmp_path):
    logs.write(tmp_path / 'a', [logs.train(10), logs.val(10, 0.3)])
    logs.write(tmp_path / 'b', [logs.train(10), dict(mIoU=30.0, step=10)])
    assert 'no metric in common' in report(tmp_path / 'a', tmp_path / 'b', out=tmp_path / 'out').text


def test_large_pictures_are_downscaled(tmp_path):
    folder = logs.write(tmp_path / 'run', [logs.train(10)])
    images = folder / '20260101_000000' / 'vis_data' / 'vis_image'
    images.mkdir()
    noise = np.random.default_rng(0).integers(256, size=(500, 2500, 3), dtype=np.uint8)
    for level in range(5):
        for step in (1, 10):
            cv2.imwrite(str(images / f'diffkd.fpn.{level}_{step}.png'), noise)
    (images / 'diffkd.fpn.5_1.png').write_bytes(b'half a picture')
    page = report(folder, out=tmp_path / 'out')
    assert (tmp_path / 'out' / 'report.html').stat().st_size < 10e6
    assert 'diffkd.fpn.5_1.png of run is damaged' in page.text


@pytest.mark.parametrize(
    'records, message',
    [
        (None, 'does not exist'),
        ([], 'has neither training logs'),
        (['broken'], 'has no readable record'),
        ([logs.train(10, **{'diffkd.old': 1.0})], 'unknown to this version: diffkd.old'),
    ],
)
def test_invalid_runs(tmp_path, records, message):
    folder = tmp_path / 'run'
    if records is not None:
        folder.mkdir()
    if records:
        logs.write(folder, records)
    done = call_tool(TOOL, folder, '-o', tmp_path / 'out', check=False)
    assert done.returncode == 2 and 'Error: ' in done.stdout and message in done.stdout
    assert 'Traceback' not in done.stdout and not (tmp_path / 'out').exists()
