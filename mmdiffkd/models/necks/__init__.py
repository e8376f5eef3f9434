from .base import DistillContext, DistillNeck, DistillOutput
from .bckd_neck import BCKDNeck
from .feature_diffusion_neck import FeatureDiffusionNeck
from .fgd_neck import FGDNeck
from .ld_neck import LDNeck

__all__ = [
    'BCKDNeck',
    'DistillContext',
    'DistillNeck',
    'DistillOutput',
    'FGDNeck',
    'FeatureDiffusionNeck',
    'LDNeck',
]
