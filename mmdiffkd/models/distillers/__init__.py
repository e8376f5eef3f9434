from .conversion import export
from .diffkd_distiller import DiffKDDistiller, convert_to_distiller
from .distill_state import DistillRecord, DistillState

__all__ = ['DiffKDDistiller', 'DistillRecord', 'DistillState', 'convert_to_distiller', 'export']
