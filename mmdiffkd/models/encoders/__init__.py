from .base import (
    LIBRARIES,
    PRETRAINED,
    EncoderTeacher,
    ImageFormat,
    LibraryEncoder,
    check_memory,
    encoder_config,
    is_encoder,
    is_library_source,
    loads_weights,
)
from .timm_encoder import TimmEncoder
from .torchvision_encoder import TorchvisionEncoder
from .transformers_encoder import TransformersEncoder

__all__ = [
    'LIBRARIES',
    'PRETRAINED',
    'EncoderTeacher',
    'ImageFormat',
    'LibraryEncoder',
    'TimmEncoder',
    'TorchvisionEncoder',
    'TransformersEncoder',
    'check_memory',
    'encoder_config',
    'is_encoder',
    'is_library_source',
    'loads_weights',
]
