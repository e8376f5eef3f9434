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


METHODS = Path(os.environ.get('MMDIFFKD_GOLDEN_METHODS') or Path(__file__).parent / 'data' / 'golden2')


def method_cases(method):
    """Return the cases of a method as pytest parameters: pairs of a file, such as ``cwd.npz``, and a case in it."""
    import pytest

    paths = [path for path in sorted(METHODS.glob('*.npz')) if re.split(r'[^a-z]', path.stem)[0] == method]
    cases = [(path, case) for path in paths for case in dict.fromkeys(name.split('/')[0] for name in np.load(path))]
    return [pytest.param(Case(path, case), id=f'{path.stem}-{case}') for path, case in cases]


class Case:
    """Arrays of one case of a method: ``hyper/*``, ``in/*``, ``draw/*``, ``weight/*``, ``out/*`` and ``grad_X/*``."""

    def __init__(self, path, name):
        self.path, self.name = path, name

    def group(self, group):
        """Return the tensors under ``<case>/<group>/`` by name."""
        prefix, arrays = f'{self.name}/{group}/', np.load(self.path)
        names = [name for name in arrays.files if name.startswith(prefix)]
        return {
            name[len(prefix) :]: torch.from_numpy(np.array(arrays[name]))
            for name in names
            if arrays[name].dtype.kind != 'U'
        }

    def hyper(self, **names):
        """Return settings as numbers: ``hyper(tau='T')`` is ``dict(tau=...)`` if the case has ``hyper/T``."""
        numbers = {name: value.item() for name, value in self.group('hyper').items()}
        numbers = {name: x if isinstance(x, int) else float(f'{x:.7g}') for name, x in numbers.items()}
        return {ours: numbers[theirs] for ours, theirs in names.items() if theirs in numbers}

    def check(self, results, leaves, aliases=None):
        """Compare results with ``out/*``, and their gradients with ``grad_X/*``.

        Args:
            results (dict[str, Tensor]): Results by name.
            leaves (dict[str, Tensor]): Inputs and parameters by the name of their gradient in the file.
            aliases (dict[str, str]): Name in ``results`` by X of ``grad_X``, where the two differ.
        """
        for name, expected in self.group('out').items():
            check_array(f'out/{name}', results[name], expected)
        arrays = np.load(self.path).files
        groups = dict.fromkeys(name.split('/')[1] for name in arrays if name.startswith(f'{self.name}/grad_'))
        for group in groups:
            expected = self.group(group)
            key, _, factor = group[len('grad_') :].partition('_x')
            result = results[(aliases or {}).get(key, key)] * float(factor or 1)
            inputs = [leaves[name] for name in expected]
            found = torch.autograd.grad(result, inputs, retain_graph=True, allow_unused=True)
            for name, gradient in zip(expected, found):
                gradient = torch.zeros_like(expected[name]) if gradient is None else gradient
                check_array(f'{group}/{name}', gradient, expected[name])


def check_array(name, found, expected):
    """Check that the largest difference is at most 1e-4 of the largest reference value."""
    assert found.shape == expected.shape, f'{name}: {tuple(found.shape)} instead of {tuple(expected.shape)}'
    difference, largest = (found - expected).abs().max(), expected.abs().max()
    assert difference <= 1e-4 * largest, f'{name} differs by {difference:.3g}; the largest value is {largest:.3g}'
