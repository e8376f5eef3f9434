from .feature_diffusion_neck import FeatureDiffusionNeck

__all__ = ['FeatureDiffusionNeck']
