"""Seed by run, rank and iteration, so that a resumed run draws the same random numbers as an uninterrupted run."""

import random
from typing import Iterator

import numpy as np
import torch
from mmengine.dist import get_rank


def seed_iteration(seed: int, iteration: int, purpose: str) -> None:
    """Seed the random generators of Python, NumPy and torch (all devices).

    Every rank draws different numbers, even if mmengine gave all ranks the same seed.

    Args:
        seed (int): Seed of the run.
        iteration (int): Current iteration, counted from 0.
        purpose (str): ``'train'`` for the training step, ``'load'`` for loading its batch.
    """
    purposes = ('train', 'load')
    entropy = np.random.SeedSequence([seed, get_rank(), iteration, purposes.index(purpose)])
    # keep 63 bits, because torch takes a signed 64-bit seed
    number = int(entropy.generate_state(1, np.uint64)[0]) >> 1
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)


class SeededBatches:
    """Batches of an iteration-based loop, with the random generators seeded before each batch.

    A hook cannot seed the first batch: a resumed loop calls no hook between skipping the old batches and loading the
    first new batch.

    Args:
        batches (Iterator): ``dataloader_iterator`` of the loop.
        seed (int): Seed of the run.
    """

    def __init__(self, batches: Iterator, seed: int):
        self._batches = batches
        self._seed = seed
        self._count = 0

    def __iter__(self):
        return self

    def __next__(self):
        seed_iteration(self._seed, self._count, 'load')
        self._count += 1
        return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Skip the batches of earlier iterations when a run is resumed.

        Only recent releases of mmengine call this method; older ones draw the batches one by one.
        """
        self._count += num_iters
        self._batches.skip_iter(num_iters)
