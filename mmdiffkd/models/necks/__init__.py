from .base import DistillContext, DistillNeck, DistillOutput
from .feature_diffusion_neck import FeatureDiffusionNeck

__all__ = ['DistillContext', 'DistillNeck', 'DistillOutput', 'FeatureDiffusionNeck']
