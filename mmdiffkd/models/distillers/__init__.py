from .conversion import BaseDistiller, export
from .diffkd_distiller import DiffKDDistiller, convert_to_distiller
from .distill_state import DistillRecord, DistillState

__all__ = ['BaseDistiller', 'DiffKDDistiller', 'DistillRecord', 'DistillState', 'convert_to_distiller', 'export']
