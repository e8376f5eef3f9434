"""Two processes with a batch each train what one process with both batches does."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from .processes import WORLD, build, cheap, compiled, fcos, images, launch, retinanet, trainable

pytestmark = pytest.mark.slow
# RetinaNet divides by its own rank's positives, upstream too: both ranks get as many
CASES = {'retinanet': (retinanet, True), 'fcos': (fcos, False), 'cheap': (cheap, True), 'compiled': (compiled, True)}
PASSES = 2  # DDP complains in the pass after one that left a parameter without gradient


def run(model, forward, data):
    """Losses of every pass and the sum of the gradients."""
    logs = []
    for _ in range(PASSES):
        loss, log = model.parse_losses(forward(**data, mode='loss'))
        loss.backward()
        logs.append({name: value.item() for name, value in log.items()})
    return logs, {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


def worker(rank, configs):
    return {case: reduce(cfg, rank, CASES[case][1]) for case, cfg in configs.items()}


def reduce(cfg, rank, same_boxes):
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
        trainable=trainable(model),
        teacher=len(teacher),
        shared=len(teacher & (reduced | wrapper)),
        buffers_of_teacher=[name for name in wrapped.state_dict() if 'teacher' in name],
    )


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What the processes found, and the configs."""
    configs = {}
    for case, (make, _) in CASES.items():
        configs[case] = make(tmp_path_factory.mktemp(case))
    return launch(worker, tmp_path_factory.mktemp('ddp'), configs), configs


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_one_large_batch(ranks, case):
    results, configs = ranks
    every = list(range(WORLD))
    model = build(configs[case], every)
    logs, gradients = run(model, model, images(model, every, CASES[case][1]))
    alive = [name for name, gradient in gradients.items() if gradient.any()]
    assert len(alive) > 0.95 * len(gradients)  # a few channels of tiny models are dead
    assert sum(name.startswith('diffkd.') for name in alive) > (20 if case == 'cheap' else 100)
    for result in results:
        assert set(result[case]['gradients']) == set(gradients)
        for name, expected in gradients.items():
            # sums of another order: what cancels out is off by parts of the largest
            tolerance = dict(rtol=1e-4, atol=1e-5 * expected.abs().max().item())
            torch.testing.assert_close(result[case]['gradients'][name], expected, **tolerance, msg=name)
    # the whole loss, term by term
    for number, expected in enumerate(logs):
        for name, value in expected.items():
            mean = sum(result[case]['logs'][number][name] for result in results) / WORLD
            assert mean == pytest.approx(value, rel=1e-5), name
    # each rank has images and noise of its own
    first, second = (result[case]['logs'][0]['diffkd.fpn.loss_diffusion'] for result in results)
    assert first != second


@pytest.mark.parametrize('case', CASES)
def test_the_teacher_is_not_communicated(ranks, case):
    for result in ranks[0]:
        found = result[case]
        assert found['teacher'] > 0 and found['shared'] == 0
        assert found['buffers_of_teacher'] == []
        assert found['nbytes'] == 4 * found['trainable'] * PASSES
