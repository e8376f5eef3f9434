"""Two ranks train the distillation only, so the head of the student never gets a gradient."""

import pytest
import torch

from tests import tiny

from .processes import dist_train

pytestmark = pytest.mark.slow


def test_parts_without_a_gradient_are_no_obstacle(tmp_path, shapes):
    cfg = tiny.run_cfg(
        tiny.distiller_cfg(tmp_path, task_loss=False),
        shapes,
        tmp_path / 'run',
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3, val_interval=99),
        default_hooks__checkpoint=dict(type='mmdiffkd.CheckpointHook', by_epoch=False, interval=1, max_keep_ckpts=-1),
        param_scheduler=[],
    )
    cfg.pop('experiment_name')
    cfg.dump(tmp_path / 'config.py')
    done = dist_train(tmp_path / 'config.py')
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'not trained, because no compared feature depends on them: bbox_head' in done.stdout
    states = [torch.load(tmp_path / 'run' / f'iter_{i}.pth', weights_only=False)['state_dict'] for i in (1, 3)]
    moved = {key.split('.')[0] for key in states[0] if not torch.equal(*(state[key] for state in states))}
    assert moved == {'backbone', 'neck', 'diffkd'}
