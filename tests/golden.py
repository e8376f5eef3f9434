"""Read reference values that were computed with the code released by the paper's authors."""

import os
import re
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get('MMDIFFKD_GOLDEN') or Path(__file__).parent / 'data' / 'golden')
TOLERANCE = dict(rtol=1e-4, atol=1e-5)

# (pattern of names in the released code, names in this package); the first match wins
RENAMES = [
    (r'^trans\.', 'align.'),
    (r'^ae\.encoder\.', 'autoencoder.encoder.'),
    (r'^ae\.decoder\.0\.', 'autoencoder.decoder.'),
    (r'^noise_adapter\.feat\.0\.block\.', 'noise_adapter.layers.layers.'),
    (r'^noise_adapter\.feat\.', 'noise_adapter.layers.'),
    (r'^model\.time_embedding\.', 'denoiser.time_embedding.'),
    (r'^model\.pred\.(\d)\.block\.', r'denoiser.layers.\1.layers.'),
    (r'^model\.pred\.', 'denoiser.layers.'),
]


def files(with_key):
    """Return the reference files that contain an array of this name."""
    return [path for path in sorted(FOLDER.glob('*.npz')) if with_key in np.load(path).files]


class Golden:
    """Arrays of a reference file as tensors. Weights are renamed as in this package."""

    def __init__(self, path):
        arrays = np.load(path)
        self._tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}

    def __getitem__(self, name):
        return self._tensors[name]

    def __contains__(self, name):
        return name in self._tensors

    def group(self, prefix):
        """Return the tensors under ``prefix/``, with the names of this package."""
        prefix += '/'
        return {_rename(k[len(prefix) :]): v for k, v in self._tensors.items() if k.startswith(prefix)}


def _rename(name):
    for pattern, new in RENAMES:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name
