"""Start and stop distillation in distributed runs, where all ranks must reduce the same gradients."""

import pytest
import torch
from mmengine.utils import digit_version

from mmdiffkd.engine.checkpoint import PREFIX
from tests import tiny

from .processes import dist_train
from .test_fsdp import CPU, STRATEGY, UNITS

pytestmark = pytest.mark.slow
NEEDS_NEW_TORCH = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6'), reason='FSDP on the CPU is tested with torch >= 2.6'
)


@pytest.mark.parametrize('kind', ['ddp', pytest.param('fsdp', marks=NEEDS_NEW_TORCH)])
def test_start_and_stop(tmp_path, shapes, kind):
    """Distill only in the second of four epochs. An epoch has two iterations."""
    cfg = tiny.run_cfg(
        tiny.distiller_cfg(tmp_path),
        shapes,
        tmp_path / 'run',
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=4, val_begin=99),
        default_hooks__checkpoint=dict(type='mmdiffkd.CheckpointHook', interval=1, max_keep_ckpts=-1),
        optim_wrapper__optimizer=dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1),
        param_scheduler=[],
        custom_hooks=[
            dict(type='mmdiffkd.DistillScheduleHook', begin=1, end=2),
            dict(type='mmdiffkd.NonFiniteHook', policy='skip'),
        ],
    )
    cfg.pop('experiment_name')
    cfg.dump(tmp_path / 'my_diffkd_config.py')
    (tmp_path / 'fsdp_units.py').write_text(UNITS)
    (tmp_path / 'fsdp.py').write_text(STRATEGY)
    (tmp_path / 'cpu.py').write_text(CPU)
    name = 'my_diffkd_config.py' if kind == 'ddp' else 'cpu.py'
    done = dist_train(tmp_path / name, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    files = [tmp_path / 'run' / f'epoch_{epoch}.pth' for epoch in range(1, 5)]
    states = [torch.load(file, weights_only=False)['state_dict'] for file in files]
    for epoch, (before, after) in enumerate(zip(states, states[1:]), start=2):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert any(not key.startswith(PREFIX) for key in moved)
        assert any(key.startswith(PREFIX) for key in moved) == (epoch == 2), f'in epoch {epoch}'
