"""Random numbers as a function of seed, process and iteration: a resumed run draws what it would have drawn."""

import random
from typing import Iterator

import numpy as np
import torch
from mmengine.dist import get_rank


def seed_iteration(seed: int, iteration: int, purpose: str) -> None:
    """Seed the generators of Python, NumPy and torch (all devices).

    Every rank draws numbers of its own, also where mmengine gave all ranks one seed.

    Args:
        seed (int): Seed of the run.
        iteration (int): The iteration that begins, from 0.
        purpose (str): ``'train'`` for the step itself, ``'load'`` for loading its batch.
    """
    purposes = ('train', 'load')
    entropy = np.random.SeedSequence([seed, get_rank(), iteration, purposes.index(purpose)])
    # 63 bits: torch takes no more without a sign
    number = int(entropy.generate_state(1, np.uint64)[0]) >> 1
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)


class SeededBatches:
    """The batches of an iteration-based loop, each loaded with random numbers of its own.

    Between the skipping of what was seen before and the first batch that is new, such a loop calls no hook.

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
        """Pass over batches; newer releases of mmengine call it, older ones take them one by one."""
        self._count += num_iters
        self._batches.skip_iter(num_iters)
