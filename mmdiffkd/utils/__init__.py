from .checkpoint import load_strict, read_checkpoint
from .config import model_of, preprocessor_of, resolve_config, zoo_checkpoint
from .suggest import nearest

__all__ = [
    'load_strict',
    'model_of',
    'nearest',
    'preprocessor_of',
    'read_checkpoint',
    'resolve_config',
    'zoo_checkpoint',
]
