from .base import ImageFormat, LibraryEncoder
from .image_encoder import ImageEncoder
from .libraries import LIBRARIES, PRETRAINED
from .library_teacher import EncoderTeacher, encoder_config, is_encoder, is_library_model, is_library_source
from .timm_encoder import TimmEncoder
from .torchvision_encoder import TorchvisionEncoder
from .transformers_encoder import TransformersEncoder

__all__ = [
    'LIBRARIES',
    'PRETRAINED',
    'EncoderTeacher',
    'ImageEncoder',
    'ImageFormat',
    'LibraryEncoder',
    'TimmEncoder',
    'TorchvisionEncoder',
    'TransformersEncoder',
    'encoder_config',
    'is_encoder',
    'is_library_model',
    'is_library_source',
]
