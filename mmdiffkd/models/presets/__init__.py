from .base import Preset
from .diffkd import DiffKDPreset
from .plus import PlusPreset

__all__ = ['DiffKDPreset', 'PlusPreset', 'Preset']
