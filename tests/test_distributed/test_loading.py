"""All ranks load the same checkpoint, and an error on one rank is raised on all ranks."""

import functools
import http.server
import os
import threading
from pathlib import Path

import pytest
import torch

from mmdiffkd.engine.resume import file_to_load

from .processes import launch

pytestmark = pytest.mark.slow


def worker(rank, address, folder):
    os.environ.update(TORCH_HOME=f'{folder}/cache', NO_PROXY='127.0.0.1')
    path = f'{folder}/only-on-rank-0.pth'  # this path does not exist for rank 1
    if rank == 1:
        path += '.gone'

    def choose(load_from, resume=False):
        try:
            return file_to_load(load_from, resume, folder, folder, 'epoch_{}.pth')
        except ValueError as error:
            return f'ValueError: {error}'

    return dict(
        url=choose(f'{address}/weights.pth'),
        cached_url=choose(f'{address}/weights.pth'),
        missing_url=choose(f'{address}/absent.pth'),
        missing_on_rank_1=choose(path),
        newest=choose(None, resume=True),
        no_file=choose(None),
    )


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Results of all ranks, the address of the server, and its folder."""
    folder = tmp_path_factory.mktemp('files')
    for name in ('weights.pth', 'only-on-rank-0.pth'):
        torch.save(dict(state_dict=dict(w=torch.ones(2))), folder / name)
    torch.save(dict(state_dict={}, meta={}, message_hub={}), folder / 'epoch_3.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_address[1]}'
        yield launch(worker, tmp_path_factory.mktemp('ranks'), address, str(folder)), address, folder
        server.shutdown()


@pytest.mark.parametrize('case', ['url', 'cached_url'])
def test_urls(results, case):
    ranks, _, folder = results
    (path,) = {rank[case] for rank in ranks}
    assert Path(path).parent == folder / 'cache' / 'hub' / 'checkpoints' and Path(path).name.startswith('weights-')


def test_error_is_raised_on_all_ranks(results):
    ranks, *_ = results
    for rank in ranks:
        assert 'absent.pth could not be downloaded' in rank['missing_url']
        assert "only-on-rank-0.pth.gone' does not exist" in rank['missing_on_rank_1']


def test_resume_uses_the_newest_checkpoint(results):
    ranks, _, folder = results
    assert [rank['newest'] for rank in ranks] == [str(folder / 'epoch_3.pth')] * 2
    assert [rank['no_file'] for rank in ranks] == [None, None]
