from .export import student_config, student_weights
from .run_config import load_run_config

__all__ = ['load_run_config', 'student_config', 'student_weights']
