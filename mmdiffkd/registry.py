"""Registries of the ``mmdiffkd`` scope. A registry imports the modules in its ``locations`` on first use."""

import difflib
from typing import List

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', scope='mmdiffkd', parent=MMENGINE_MODELS, locations=['mmdiffkd.models'])
HOOKS = Registry('hook', scope='mmdiffkd', parent=MMENGINE_HOOKS, locations=['mmdiffkd.engine.hooks'])
DATASETS = Registry('dataset', scope='mmdiffkd', parent=MMENGINE_DATASETS, locations=['mmdiffkd.datasets'])
TRANSFORMS = Registry('transform', scope='mmdiffkd', parent=MMENGINE_TRANSFORMS, locations=['mmdiffkd.datasets'])
PRESETS = Registry('preset', scope='mmdiffkd', locations=['mmdiffkd.models.presets'])


def closest_own(kind: str, registry: str) -> List[str]:
    """Return the classes of mmdiffkd whose names are close to an unknown ``type``, the closest first.

    >>> closest_own('DiffKDDistiler', 'model')
    ['mmdiffkd.DiffKDDistiller']
    """
    for own in (MODELS, HOOKS, DATASETS, TRANSFORMS):
        if own.name == registry:
            own.import_from_location()
            close = difflib.get_close_matches(kind.rpartition('.')[2], own.module_dict, cutoff=0.75)
            return [f'mmdiffkd.{name}' for name in close]
    return []
