"""Read reference values of other methods' released code: one file a method, with keys ``<case>/<group>/<name>``."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get('MMDIFFKD_GOLDEN_METHODS') or Path(__file__).parent / 'data' / 'golden2')
TOLERANCE = 1e-4  # of the largest entry of an array


def cases(method, *needed):
    """Return test parameters ``(path, case)`` of all cases of a method that have these arrays."""
    found = []
    for path in sorted(FOLDER.glob(f'{method}*.npz')):
        names = np.load(path).files
        for case in dict.fromkeys(name.split('/')[0] for name in names):
            if all(f'{case}/{name}' in names for name in needed):
                found.append(pytest.param(path, case, id=f'{path.stem}-{case}'))
    return found


def load(path, case):
    """Return the arrays of a case: tensors by ``<group>/<name>``, and the scalars of ``hyper`` as numbers."""
    arrays = np.load(path)
    names = [name for name in arrays.files if name.startswith(f'{case}/')]
    data = {name[len(case) + 1 :]: torch.from_numpy(np.array(arrays[name])) for name in names}
    return {name: value.item() if name.startswith('hyper/') else value for name, value in data.items()}


def group(data, name):
    """Return the entries under ``<name>/``."""
    return {key[len(name) + 1 :]: value for key, value in data.items() if key.startswith(f'{name}/')}


def check(found, expected, name=''):
    """Compare an array with the reference, relative to the largest entry of the reference."""
    assert found.shape == expected.shape, name
    difference = (found.detach() - expected).abs().max() if expected.numel() else torch.tensor(0.0)
    assert difference <= TOLERANCE * expected.abs().max(), f'{name}: {difference:g} of {expected.abs().max():g}'
