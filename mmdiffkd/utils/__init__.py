from .check_config import closest_names
from .config import (
    get_custom_imports,
    get_model_cfg,
    get_preprocessor_cfg,
    read_config,
    resolve_config,
    with_preprocessor,
)
from .image_settings import image_channels
from .meta_device import QuickInit, QuickMeta, build_for_inspection, build_on_meta, saved_activation_bytes
from .model_index import zoo_checkpoint

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
