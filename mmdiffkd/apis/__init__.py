from .build import build_distiller, build_model
from .export import student_config, student_weights
from .run_config import load_run_config

__all__ = ['build_distiller', 'build_model', 'load_run_config', 'student_config', 'student_weights']
