from .skip_non_finite_hook import SkipNonFiniteHook

__all__ = ['SkipNonFiniteHook']
