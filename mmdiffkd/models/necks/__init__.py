from .base import DistillContext, DistillNeck, DistillOutput
from .fbkd_neck import FBKDNeck
from .feature_diffusion_neck import FeatureDiffusionNeck
from .mgd_neck import MGDNeck

__all__ = ['DistillContext', 'DistillNeck', 'DistillOutput', 'FBKDNeck', 'FeatureDiffusionNeck', 'MGDNeck']
