from .base import DistillContext, DistillNeck, DistillOutput
from .bckd_neck import BCKDNeck
from .crosskd_neck import CrossKDNeck
from .fbkd_neck import FBKDNeck
from .feature_diffusion_neck import FeatureDiffusionNeck
from .fgd_neck import FGDNeck
from .ld_neck import LDNeck
from .mgd_neck import MGDNeck

__all__ = [
    'BCKDNeck',
    'CrossKDNeck',
    'DistillContext',
    'DistillNeck',
    'DistillOutput',
    'FBKDNeck',
    'FGDNeck',
    'FeatureDiffusionNeck',
    'LDNeck',
    'MGDNeck',
]
