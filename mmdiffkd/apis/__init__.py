from .build import build_distiller, build_model
from .compare import compare
from .distill import distill
from .export import export_student, student_config, student_weights
from .list_presets import list_presets
from .make_config import make_config
from .parallel import Job, JobResult, available_cores, available_gpus, run_parallel
from .pretrain import pretrain, pretrain_config
from .preview import list_taps, preview
from .run_config import load_run_config

__all__ = [
    'Job',
    'JobResult',
    'available_cores',
    'available_gpus',
    'build_distiller',
    'build_model',
    'compare',
    'distill',
    'export_student',
    'list_presets',
    'list_taps',
    'load_run_config',
    'make_config',
    'pretrain',
    'pretrain_config',
    'preview',
    'run_parallel',
    'student_config',
    'student_weights',
]
