from .base import DistillContext, DistillNeck, DistillOutput
from .feature_diffusion_neck import FeatureDiffusionNeck
from .fgd_neck import FGDNeck

__all__ = ['DistillContext', 'DistillNeck', 'DistillOutput', 'FGDNeck', 'FeatureDiffusionNeck']
