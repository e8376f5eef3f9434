from .at import ATPreset
from .base import Preset
from .cwd import CWDPreset
from .cwd_norm import CWDNormPreset
from .diffkd import DiffKDPreset
from .dist import DISTPreset
from .dkd import DKDPreset
from .fbkd import FBKDPreset
from .fitnet import FitNetPreset
from .kd import KDPreset
from .mgd import MGDPreset
from .pkd import PKDPreset
from .plus import PlusPreset

__all__ = [
    'ATPreset',
    'CWDNormPreset',
    'CWDPreset',
    'DISTPreset',
    'DKDPreset',
    'DiffKDPreset',
    'FBKDPreset',
    'FitNetPreset',
    'KDPreset',
    'MGDPreset',
    'PKDPreset',
    'PlusPreset',
    'Preset',
]
