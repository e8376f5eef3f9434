from mmdiffkd.cli import exit_on_mistake

from .checkpoint import (
    PREFIX,
    DamagedFileError,
    check_is_data,
    fingerprint,
    load_strict,
    read_checkpoint,
    without_diffusion_part,
)
from .config import (
    image_channels,
    imports_of,
    model_of,
    preprocessor_of,
    resolve_config,
    with_preprocessor,
    zoo_checkpoint,
)
from .kept import kept_bytes
from .skeleton import QuickInit, QuickMeta, build_on_meta, skeleton
from .suggest import nearest

__all__ = [
    'DamagedFileError',
    'PREFIX',
    'QuickInit',
    'QuickMeta',
    'build_on_meta',
    'check_is_data',
    'exit_on_mistake',
    'fingerprint',
    'image_channels',
    'imports_of',
    'kept_bytes',
    'load_strict',
    'model_of',
    'nearest',
    'preprocessor_of',
    'read_checkpoint',
    'resolve_config',
    'skeleton',
    'with_preprocessor',
    'without_diffusion_part',
    'zoo_checkpoint',
]
