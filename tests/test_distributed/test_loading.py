"""What is loaded is agreed on: no rank waits for one that has met an error."""

import functools
import http.server
import os
import threading

import pytest
import torch

from mmdiffkd.engine.checkpoint import file_to_load

from .processes import launch

pytestmark = pytest.mark.slow


def worker(rank, address, folder):
    os.environ.update(TORCH_HOME=f'{folder}/cache', NO_PROXY='127.0.0.1')
    mine = f'{folder}/only-on-rank-0.pth'  # rank 1 has no such file
    if rank == 1:
        mine += '.gone'

    def ask(load_from, resume=False):
        try:
            return file_to_load(load_from, resume, folder, folder, 'epoch_{}.pth')
        except ValueError as error:
            return f'ValueError: {error}'

    return dict(
        url=ask(f'{address}/weights.pth'),
        again=ask(f'{address}/weights.pth'),
        absent_url=ask(f'{address}/absent.pth'),
        one_rank_without=ask(mine),
        newest=ask(None, resume=True),
        none=ask(None),
    )


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
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


@pytest.mark.parametrize('case', ['url', 'again'])
def test_addresses(answers, case):
    ranks, address, _ = answers
    assert [rank[case] for rank in ranks] == [f'{address}/weights.pth'] * 2


def test_an_error_reaches_all_ranks(answers):
    ranks, *_ = answers
    for rank in ranks:
        assert 'absent.pth could not be downloaded' in rank['absent_url']
        assert "only-on-rank-0.pth.gone' does not exist" in rank['one_rank_without']


def test_resume(answers):
    ranks, _, folder = answers
    assert [rank['newest'] for rank in ranks] == [str(folder / 'epoch_3.pth')] * 2
    assert [rank['none'] for rank in ranks] == [None, None]
