from .base import Preset
from .bckd import BCKDPreset
from .crosskd import CrossKDPreset
from .diffkd import DiffKDPreset
from .fgd import FGDPreset
from .ld import LDPreset
from .plus import PlusPreset

__all__ = ['BCKDPreset', 'CrossKDPreset', 'DiffKDPreset', 'FGDPreset', 'LDPreset', 'PlusPreset', 'Preset']
