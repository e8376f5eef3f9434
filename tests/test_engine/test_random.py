import random

import numpy as np
import pytest
import torch

from mmdiffkd.engine import random as random_module


def draw(monkeypatch, seed=3, rank=0, iteration=5, purpose='train'):
    """Return the first number of every generator in an iteration."""
    monkeypatch.setattr(random_module, 'get_rank', lambda: rank)
    with torch.random.fork_rng(devices=[]):
        random_module.seed_iteration(seed, iteration, purpose)
        return random.random(), np.random.rand(), torch.rand(1).item()


def test_same_iteration_draws_the_same_numbers(monkeypatch):
    assert draw(monkeypatch) == draw(monkeypatch)


@pytest.mark.parametrize('change', [dict(seed=4), dict(rank=1), dict(iteration=6), dict(purpose='load')], ids=str)
def test_numbers_depend_on_seed_rank_iteration_and_purpose(monkeypatch, change):
    assert not set(draw(monkeypatch)) & set(draw(monkeypatch, **change))
