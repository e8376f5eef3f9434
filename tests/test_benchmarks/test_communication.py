"""Compare the estimate with parameter counts of the plain models and of the paper's layers."""

import re

import pytest
from mmengine.registry import MODELS

from benchmarks import communication
from mmdiffkd.utils import get_model_cfg, resolve_config
from tests.conftest import ROOT, call_tool

TOOL = ROOT / 'benchmarks' / 'communication.py'
CONFIG = 'configs/diffkd_retinanet_r101_r50.py'


def count(config, trainable_only):
    cfg = get_model_cfg(resolve_config(config))
    cfg.backbone.init_cfg = None
    params = MODELS.build(cfg).train().parameters()
    return sum(param.numel() for param in params if param.requires_grad or not trainable_only)


def conv(inside, outside, kernel=1):
    return inside * outside * kernel**2 + outside


def bottleneck(channels, hidden):
    convs = conv(channels, hidden) + conv(hidden, hidden, 3) + conv(hidden, channels)
    return convs + 2 * (hidden + hidden + channels)


def diffusion_module(channels=256, levels=5, timesteps=1000):
    """Return the number of parameters without an autoencoder. The pair of regression outputs has no parameters."""
    denoiser = timesteps * channels + 2 * bottleneck(channels, channels // 4) + conv(channels, channels) + 2 * channels
    adapter = bottleneck(channels, channels // 8) + channels * 2 + 2
    return levels * (conv(channels, channels) + denoiser + adapter + conv(channels, channels) + 2 * channels)


def test_parameters_and_traffic():
    text = call_tool(TOOL, CONFIG).stdout
    text = text[text.index('                  parameters') :]  # skip upstream's warnings
    found = dict(re.findall(r'^(student|diffusion module|both|teacher) +([\d,]+)', text, re.MULTILINE))
    found = {name: int(number.replace(',', '')) for name, number in found.items()}
    student = count('mmdet::retinanet/retinanet_r50_fpn_2x_coco.py', trainable_only=True)
    diffusion = diffusion_module()
    assert found == dict(
        student=student,
        both=student + diffusion,
        teacher=count('mmdet::retinanet/retinanet_r101_fpn_2x_coco.py', trainable_only=False),
        **{'diffusion module': diffusion},
    )
    assert f'adds {100 * diffusion / student:.1f}%' in text
    rows = [list(map(float, line.split())) for line in text.splitlines() if re.match(r' +\d', line)]
    assert [row[0] for row in rows] == [2, 8, 64]
    for gpus, *figures in rows:
        sent = [2 * (gpus - 1) / gpus * 4 * size for size in (student, diffusion, student + diffusion)]
        assert figures == pytest.approx(
            [size / 1e6 for size in sent] + [size / 12.5e9 * 1e3 for size in sent], abs=0.051
        )
    assert text.strip() in (ROOT / 'docs' / 'run' / 'multi_gpu.md').read_text()


def test_bandwidth(capsys):
    communication.print_traffic(1_000_000, 500_000, [4], 0.5)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split() == ['4', '6.0', '3.0', '9.0', '12.0', '6.0', '18.0']


def test_one_gpu_sends_nothing():
    assert communication.ring_bytes(1000, 1) == 0
    assert communication.ring_bytes(1000, 64) == pytest.approx(2 * 63 / 64 * 4000)


@pytest.mark.parametrize(
    'args, message',
    [
        (['--cfg-options', 'model.teacher=None'], 'cannot be distilled: it has no teacher'),
        (['--cfg-options', 'model.teacher.config=absent.py'], "The config file 'absent.py' does not exist"),
        (['--cfg-options', 'model.student.type=RetinaNett'], 'RetinaNett is not in the mmdet::model registry'),
        (['--bandwidth', 0], 'must be positive'),
    ],
)
def test_mistakes(args, message):
    done = call_tool(TOOL, CONFIG, *args, check=False)
    assert done.returncode == 2 and message in done.stdout.splitlines()[-1]
