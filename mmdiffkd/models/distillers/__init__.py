from .diffkd_distiller import DiffKDDistiller, convert_to_distiller, export

__all__ = ['DiffKDDistiller', 'convert_to_distiller', 'export']
