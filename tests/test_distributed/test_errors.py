"""An error on one rank is raised on all ranks, so that no rank waits for the others."""

import os

import pytest
import torch

from mmdiffkd.engine.checkpoint import read_checkpoint
from mmdiffkd.engine.distributed import destroy_nccl_group, on_all_ranks
from tests import tiny

from .processes import launch


def run(function):
    try:
        return function()
    except Exception as error:
        return f'{type(error).__name__}: {error}'


def worker(rank, folder):
    def fail_on(failing, error):
        if rank == failing:
            raise error
        return 'fine'

    results = dict(
        fine=run(lambda: on_all_ranks(lambda: rank)),
        one=run(lambda: on_all_ranks(lambda: fail_on(1, KeyError('x')))),
        both=run(lambda: on_all_ranks(lambda: fail_on(rank, OSError(f'rank {rank}')))),
    )
    os.environ['TORCH_HOME'] = f'{folder}/cache'
    if rank == 0:
        makedirs, os.makedirs = os.makedirs, refuse
    results['cache'] = run(lambda: read_checkpoint('http://127.0.0.1:9/x.pth'))
    if rank == 0:
        os.makedirs = makedirs
    cfg = torch.load(f'{folder}/cfg.pth', weights_only=False)
    if rank == 1:  # on one of the machines, the weights of the teacher are missing
        cfg.teacher.checkpoint += '.gone'
    results['weights'] = run(lambda: tiny.build(cfg))
    cfg.teacher.checkpoint = 'http://127.0.0.1:9/x.pth'  # the other rank would download the weights first
    if rank == 1:  # or its config
        cfg.teacher.config = 'gone.py'
    results['config'] = run(lambda: tiny.build(cfg))
    destroy_nccl_group()
    results['keeps gloo'] = torch.distributed.is_initialized()
    return results


def refuse(path, *args, **options):
    raise PermissionError(13, 'Permission denied', path)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    torch.save(tiny.distiller_cfg(folder), folder / 'cfg.pth')
    return launch(worker, tmp_path_factory.mktemp('ranks'), str(folder))


@pytest.mark.situation(
    'places',
    'File or folder that one of several processes cannot use',
    'huggingface_hub #2797, ilab-on-ocp #26',
    'All processes stop at once with the same error message.',
)
def test_same_sentence_on_all_ranks(results):
    sentences = dict(
        one="'x'",
        both='rank 0',
        cache='could not be downloaded: [Errno 13] Permission denied',
        weights="teacher.pth.gone' does not exist",
        config="config file 'gone.py' does not exist",
    )
    for name, part in sentences.items():
        texts = [rank[name].partition(': ')[2] for rank in results]
        assert texts[0] == texts[1] and part in texts[0], (name, texts)
    assert 'TORCH_HOME' in results[1]['cache']
    assert [rank['fine'] for rank in results] == [0, 1]
    assert all(rank['keeps gloo'] for rank in results)
