from .config import (
    closest_names,
    get_custom_imports,
    get_model_cfg,
    get_preprocessor_cfg,
    image_channels,
    read_config,
    resolve_config,
    with_preprocessor,
    zoo_checkpoint,
)
from .meta_device import QuickInit, QuickMeta, build_for_inspection, build_on_meta, saved_activation_bytes

__all__ = [
    'QuickInit',
    'QuickMeta',
    'build_on_meta',
    'image_channels',
    'get_custom_imports',
    'saved_activation_bytes',
    'get_model_cfg',
    'closest_names',
    'get_preprocessor_cfg',
    'read_config',
    'resolve_config',
    'build_for_inspection',
    'with_preprocessor',
    'zoo_checkpoint',
]
