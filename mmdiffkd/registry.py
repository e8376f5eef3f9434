"""Registries of the ``mmdiffkd`` scope. A registry imports the modules in its ``locations`` on first use."""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', scope='mmdiffkd', parent=MMENGINE_MODELS, locations=['mmdiffkd.models'])
HOOKS = Registry('hook', scope='mmdiffkd', parent=MMENGINE_HOOKS, locations=['mmdiffkd.engine.hooks'])
PRESETS = Registry('preset', scope='mmdiffkd', locations=['mmdiffkd.models.presets'])
