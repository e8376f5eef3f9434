import random

import numpy as np
import pytest
import torch

from mmdiffkd.engine import random as random_module


def draw(monkeypatch, seed=3, rank=0, iteration=5, purpose='train'):
    """Numbers of all generators that an iteration of a process begins with."""
    monkeypatch.setattr(random_module, 'get_rank', lambda: rank)
    with torch.random.fork_rng(devices=[]):
        random_module.seed_iteration(seed, iteration, purpose)
        return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_iteration_draws_the_same(monkeypatch):
    assert draw(monkeypatch) == draw(monkeypatch)


@pytest.mark.parametrize('other', [dict(seed=4), dict(rank=1), dict(iteration=6), dict(purpose='load')], ids=str)
def test_another_seed_process_iteration_or_purpose_draws_other_numbers(monkeypatch, other):
    assert not set(draw(monkeypatch)) & set(draw(monkeypatch, **other))
