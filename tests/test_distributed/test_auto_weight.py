"""``loss_weight='auto'`` in two processes."""

from math import exp, log

import pytest
from mmengine.model import MMDistributedDataParallel

from mmdiffkd.models.distillers.auto_weight import HEAD_RATIO

from .processes import build, images, launch
from .test_ddp import fcos

pytestmark = pytest.mark.slow
STEPS = 3


def config(folder):
    path = 'bbox_head.conv_cls'
    loss_kd = dict(type='mmdiffkd.ChannelWiseDivergence', loss_weight='auto')
    return fcos(folder, cls=dict(student=path, teacher=path, neck=dict(denoise=False, align=False, loss_kd=loss_kd)))


def worker(rank, cfg):
    model = build(cfg, [rank])
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    data, weight = images(model, [rank], False), model.auto_weights['cls']
    weights, norms = [], []
    for _ in range(STEPS):
        losses = wrapped(**data, mode='loss')
        weights.append(losses['diffkd.cls.auto_weight'].item())
        model.parse_losses(losses)[0].backward()
        norms.append(weight._norms.tolist())
    model.update_auto_weights()
    return dict(weights=weights, norms=norms, state={key: value.item() for key, value in weight.state_dict().items()})


def test_ranks_have_the_same_weight(tmp_path):
    """The norms are over the images of all ranks."""
    (tmp_path / 'ranks').mkdir()
    results = launch(worker, tmp_path / 'ranks', config(tmp_path))
    first, second = results
    assert first['norms'] != second['norms']
    assert first['weights'][1:] == second['weights'][1:] and first['state'] == second['state']
    measured = [
        log(sum(norms[0] for norms in both) / sum(norms[1] for norms in both)) / 2
        for both in zip(first['norms'], second['norms'])
    ]
    assert first['weights'][1:] == pytest.approx([HEAD_RATIO * exp(value) for value in measured[:2]], rel=1e-4)
    assert first['state']['log_ratio'] == pytest.approx(sum(measured[1:]) / 2, rel=1e-4)
    assert first['state']['count'] == STEPS - 1
