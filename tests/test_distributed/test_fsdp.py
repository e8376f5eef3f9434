"""Sharded training over gloo gives the same weights as DDP, and checkpoints with the student's keys."""

import re

import pytest
import torch
from mmengine.model import MMDistributedDataParallel, MMFullyShardedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.utils import digit_version
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

from mmdiffkd.engine.checkpoint import PREFIX
from tests import tiny
from tests.conftest import ROOT

from .processes import WORLD, build, dist_train, images, launch, num_trainable, retinanet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        digit_version(torch.__version__) < digit_version('2.6'), reason='FSDP on the CPU is tested with torch >= 2.6'
    ),
]
STEPS = 2
DOCS = (ROOT / 'docs' / 'run' / 'multi_gpu.md').read_text()
UNITS, STRATEGY, *_, CPU = re.findall(r'```python\n(.*?)```', DOCS, re.DOTALL)
UNIT_PATHS = ('backbone', 'neck', 'diffkd.fpn', 'diffkd.fpn.levels.0')


def by_ddp(model):
    return MMDistributedDataParallel(model, broadcast_buffers=False)


def by_fsdp(units):
    def wrap(model):
        chosen = [model.get_submodule(name) for name in units]

        def policy(module, recurse, nonwrapped_numel):
            return recurse or any(module is unit for unit in chosen)

        # set device_id: without it, FSDP looks for an accelerator, and a number would select a GPU
        return MMFullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device('cpu'))

    return wrap


def by_policy(model):
    """Wrap a model with the policy of the documentation."""
    scope = {}
    exec(UNITS, scope)
    called_parts = scope['called_parts']
    return MMFullyShardedDataParallel(model, auto_wrap_policy=called_parts, device_id=torch.device('cpu'))


def by_fully_shard(units):
    def wrap(model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh('cpu', (WORLD,))
        for name in units:
            fully_shard(model.get_submodule(name), mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrap


def full_weights(wrapped):
    """Return the full weights with the keys of the plain model."""
    if isinstance(wrapped, MMDistributedDataParallel):
        return {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
            return {name: value.clone() for name, value in wrapped.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))


def train(cfg, rank, wrap):
    model = build(cfg, [rank])
    total = num_trainable(model)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
    data = images(model, [rank])
    for _ in range(STEPS):
        loss, _ = model.parse_losses(wrapped(**data, mode='loss'))
        OptimWrapper(optimizer).update_params(loss)
    teacher = {param.data_ptr() for param in model.diffkd_teacher.model.parameters()}
    params = list(wrapped.parameters())
    return dict(
        weights=full_weights(wrapped),
        units=sum(isinstance(module, FullyShardedDataParallel) for module in wrapped.modules()),
        share=sum((param.to_local() if hasattr(param, 'to_local') else param).numel() for param in params) / total,
        teacher_is_inside=any(param.data_ptr() in teacher for param in params if not hasattr(param, 'to_local')),
    )


def error_of_head_as_unit(cfg, rank):
    try:
        train(cfg, rank, by_fsdp(('backbone', 'bbox_head')))
    except RuntimeError as error:
        return str(error)


def worker(rank, cfg):
    wraps = {
        'ddp': by_ddp,
        'root only': by_fsdp(()),
        'modules': by_fsdp(UNIT_PATHS),
        'policy': by_policy,
        # FSDP2 keeps the modules and changes their classes, so the head can be a unit
        'fully_shard': by_fully_shard((*UNIT_PATHS[:3], 'bbox_head')),
    }
    results = {name: train(cfg, rank, wrap) for name, wrap in wraps.items()}
    return results, error_of_head_as_unit(cfg, rank)


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    cfg = retinanet(tmp_path_factory.mktemp('teacher'))
    return launch(worker, tmp_path_factory.mktemp('fsdp'), cfg), cfg


@pytest.mark.parametrize('name, units', [('root only', 1), ('modules', 5), ('policy', None), ('fully_shard', 0)])
def test_weights_match_ddp(ranks, name, units):
    (results, _), cfg = ranks[0][0], ranks[1]
    before, expected, found = build(cfg, [0]).state_dict(), results['ddp']['weights'], results[name]
    changed = [key for key in expected if not torch.equal(expected[key], before[key])]
    assert any(key.startswith(PREFIX) for key in changed) and any(key.startswith('backbone') for key in changed)
    assert list(found['weights']) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found['weights'][key], value, rtol=1e-5, atol=1e-6, msg=key)
    if units is not None:
        assert found['units'] == units


@pytest.mark.parametrize('name', ['root only', 'modules', 'policy', 'fully_shard'])
def test_each_rank_holds_its_shard(ranks, name):
    for results, _ in ranks[0]:
        assert not results[name]['teacher_is_inside']
        assert results[name]['share'] == pytest.approx(1 / WORLD, rel=0.01)


def test_full_checkpoint_has_the_keys_of_the_plain_student(ranks):
    student = MODELS.build(tiny.detector())
    keys = {key for key in ranks[0][0][0]['modules']['weights'] if not key.startswith(PREFIX)}
    assert keys == set(student.state_dict())


def test_head_cannot_be_a_unit(ranks):
    """FSDP gathers weights in ``forward()``, but heads are called through ``loss()``."""
    for _, error in ranks[0]:
        assert 'weight' in error


def test_documented_strategy_trains(tmp_path, shapes):
    """Run the code blocks of the documentation with the command given there."""
    (tmp_path / 'fsdp_units.py').write_text(UNITS)
    cfg = tiny.run_cfg(
        tiny.distiller_cfg(tmp_path),
        shapes,
        tmp_path / 'run',
        train_cfg=dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1, val_interval=1),
        param_scheduler=[],
    )
    cfg.pop('experiment_name')
    cfg.dump(tmp_path / 'my_diffkd_config.py')
    (tmp_path / 'fsdp.py').write_text(STRATEGY)
    (tmp_path / 'cpu.py').write_text(CPU)
    done = dist_train(tmp_path / 'cpu.py', PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    content = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)
    assert any(key.startswith(PREFIX) for key in content['state_dict'])
    model = tiny.build(tiny.distiller_cfg(tmp_path))
    assert set(content['state_dict']) == set(model.state_dict())
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(content['optimizer']['state']) == names
