from .at import ATPreset
from .base import Preset
from .bckd import BCKDPreset
from .cosine import CosinePreset
from .crosskd import CrossKDPreset
from .cwd import CWDPreset
from .cwd_bckd import CWDBCKDPreset
from .cwd_head import CWDHeadPreset
from .cwd_norm import CWDNormPreset
from .diffkd import DiffKDPreset
from .dist import DISTPreset
from .dkd import DKDPreset
from .fbkd import FBKDPreset
from .fgd import FGDPreset
from .fitnet import FitNetPreset
from .kd import KDPreset
from .ld import LDPreset
from .mgd import MGDPreset
from .pkd import PKDPreset
from .plus import PlusPreset

__all__ = [
    'ATPreset',
    'BCKDPreset',
    'CWDBCKDPreset',
    'CWDHeadPreset',
    'CWDNormPreset',
    'CWDPreset',
    'CosinePreset',
    'CrossKDPreset',
    'DISTPreset',
    'DKDPreset',
    'DiffKDPreset',
    'FBKDPreset',
    'FGDPreset',
    'FitNetPreset',
    'KDPreset',
    'LDPreset',
    'MGDPreset',
    'PKDPreset',
    'PlusPreset',
    'Preset',
]
