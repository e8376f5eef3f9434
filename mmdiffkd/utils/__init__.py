from .checkpoint import PREFIX, check_is_data, fingerprint, load_strict, read_checkpoint, without_diffusion_part
from .config import model_of, preprocessor_of, resolve_config, zoo_checkpoint
from .suggest import nearest

__all__ = [
    'PREFIX',
    'check_is_data',
    'fingerprint',
    'load_strict',
    'model_of',
    'nearest',
    'preprocessor_of',
    'read_checkpoint',
    'resolve_config',
    'without_diffusion_part',
    'zoo_checkpoint',
]
