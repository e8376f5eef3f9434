from .build import build_distiller, build_model
from .distill import distill
from .export import student_config, student_weights
from .list_presets import list_presets
from .make_config import make_config
from .parallel import Job, JobResult, available_cores, run_parallel
from .preview import list_taps, preview
from .run_config import load_run_config

__all__ = [
    'Job',
    'JobResult',
    'available_cores',
    'build_distiller',
    'build_model',
    'distill',
    'list_presets',
    'list_taps',
    'load_run_config',
    'make_config',
    'preview',
    'run_parallel',
    'student_config',
    'student_weights',
]
