from .base import Preset
from .bckd import BCKDPreset
from .crosskd import CrossKDPreset
from .cwd_bckd import CWDBCKDPreset
from .cwd_head import CWDHeadPreset
from .diffkd import DiffKDPreset
from .fgd import FGDPreset
from .ld import LDPreset
from .plus import PlusPreset

__all__ = [
    'BCKDPreset',
    'CWDBCKDPreset',
    'CWDHeadPreset',
    'CrossKDPreset',
    'DiffKDPreset',
    'FGDPreset',
    'LDPreset',
    'PlusPreset',
    'Preset',
]
