from .build import build_distiller, build_model
from .export import student_config, student_weights
from .preview import list_taps, preview
from .run_config import load_run_config

__all__ = [
    'build_distiller',
    'build_model',
    'list_taps',
    'load_run_config',
    'preview',
    'student_config',
    'student_weights',
]
