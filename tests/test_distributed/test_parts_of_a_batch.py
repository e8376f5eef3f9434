"""A head that no image reaches on one of the ranks neither stops nor separates the ranks."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope

from tests import tiny
from tests.test_models.test_distillers import test_calls

from .processes import WORLD, launch

pytestmark = pytest.mark.slow
COLOR = dict(test_calls.TestPartsOfABatch.COLOR, neck=dict(denoiser=dict(type='mmdiffkd.MLPDenoiser')))


def worker(rank, cfg):
    init_default_scope('mmpretrain')
    model = tiny.build(cfg)
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for iteration in range(3):
        labels = (
            [dict(shape=0), dict(shape=1)] if iteration % WORLD == rank else [dict(shape=0, color=1), dict(shape=1)]
        )
        loss, log = model.parse_losses(wrapped(**test_calls.TestPartsOfABatch().batch(model, labels), mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(log['diffkd.color.loss_kd'].item())
    weights = {name: weight.detach() for name, weight in model.named_parameters() if name.startswith('diffkd.')}
    return losses, weights


def test_ranks_without_labels(tmp_path):
    init_default_scope('mmpretrain')
    cfg = tiny.distiller_cfg(tmp_path, test_calls.multi_task(8), test_calls.multi_task(16), distill=dict(color=COLOR))
    (first, weights), (second, others) = launch(worker, tmp_path, cfg)
    assert [loss == 0 for loss in first] == [True, False, True] and [loss == 0 for loss in second] == [
        False,
        True,
        False,
    ]
    torch.testing.assert_close(weights, others)
