"""Two processes with one batch each compute the same gradients as one process with both batches."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from .processes import WORLD, build, compiled, fcos, heads, images, launch, low_memory, num_trainable, retinanet

pytestmark = pytest.mark.slow
# Functions that build the config, and whether all ranks have the same boxes. RetinaNet needs the same boxes, because it
# divides its losses by the number of positives of each rank instead of the average.
CASES = {
    'retinanet': (retinanet, True),
    'fcos': (fcos, False),
    'heads': (heads, True),
    'low_memory': (low_memory, True),
    'compiled': (compiled, True),
}
PASSES = 2  # two, because DDP reports a parameter without a gradient only in the next pass


def run(model, forward, data):
    """Return the losses of every pass and the accumulated gradients."""
    logs = []
    for _ in range(PASSES):
        loss, log = model.parse_losses(forward(**data, mode='loss'))
        loss.backward()
        logs.append({name: value.item() for name, value in log.items()})
    return logs, {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


def worker(rank, configs):
    return {case: run_ddp(cfg, rank, CASES[case][1]) for case, cfg in configs.items()}


def run_ddp(cfg, rank, same_boxes):
    model = build(cfg, [rank])
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    nbytes, reduced = [], set()

    def count(_, bucket):
        nbytes.append(bucket.buffer().nbytes)
        reduced.update(param.data_ptr() for param in bucket.parameters())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    logs, gradients = run(model, wrapped, images(model, [rank], same_boxes))
    teacher = {param.data_ptr() for param in model.diffkd_teacher.model.parameters()}
    wrapper = {param.data_ptr() for param in wrapped.parameters()}
    return dict(
        logs=logs,
        gradients=gradients,
        nbytes=sum(nbytes),
        trainable=num_trainable(model),
        teacher=len(teacher),
        shared=len(teacher & (reduced | wrapper)),
        buffers_of_teacher=[name for name in wrapped.state_dict() if 'teacher' in name],
    )


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """Results of all ranks, and the configs."""
    configs = {}
    for case, (make, _) in CASES.items():
        configs[case] = make(tmp_path_factory.mktemp(case))
    return launch(worker, tmp_path_factory.mktemp('ddp'), configs), configs


@pytest.mark.parametrize('case', CASES)
def test_gradients_match_one_large_batch(ranks, case):
    results, configs = ranks
    all_ranks = list(range(WORLD))
    model = build(configs[case], all_ranks)
    logs, gradients = run(model, model, images(model, all_ranks, CASES[case][1]))
    nonzero = [name for name, gradient in gradients.items() if gradient.any()]
    assert len(nonzero) > 0.95 * len(gradients)  # some gradients are zero, because tiny models have dead channels
    assert sum(name.startswith('diffkd.') for name in nonzero) > (20 if case == 'low_memory' else 100)
    for result in results:
        assert set(result[case]['gradients']) == set(gradients)
        for name, expected in gradients.items():
            # the order of summation differs, so the error scales with the largest value
            tolerance = dict(rtol=1e-4, atol=1e-5 * expected.abs().max().item())
            torch.testing.assert_close(result[case]['gradients'][name], expected, **tolerance, msg=name)
    # compare every term of the loss
    for number, expected in enumerate(logs):
        for name, value in expected.items():
            mean = sum(result[case]['logs'][number][name] for result in results) / WORLD
            assert mean == pytest.approx(value, rel=1e-5), name
    # the losses differ between ranks, because images and noise differ
    first, second = (result[case]['logs'][0]['diffkd.fpn.loss_diffusion'] for result in results)
    assert first != second


@pytest.mark.parametrize('case', CASES)
def test_teacher_is_not_communicated(ranks, case):
    for result in ranks[0]:
        found = result[case]
        assert found['teacher'] > 0 and found['shared'] == 0
        assert found['buffers_of_teacher'] == []
        assert found['nbytes'] == 4 * found['trainable'] * PASSES
