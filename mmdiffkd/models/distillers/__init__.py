from .diffkd_distiller import DiffKDDistiller, DistillRecord, DistillState, convert_to_distiller, export

__all__ = ['DiffKDDistiller', 'DistillRecord', 'DistillState', 'convert_to_distiller', 'export']
