from .autoencoder import LinearAutoencoder
from .denoisers import Bottleneck, BottleneckDenoiser, MLPDenoiser
from .feature_diffusion import DiffusionOutput, FeatureDiffusion, NoiseInputs
from .noise_adapters import FixedGamma, MLPNoiseAdapter, NoiseAdapter
from .schedulers import DDIMScheduler

__all__ = [
    'Bottleneck',
    'BottleneckDenoiser',
    'DDIMScheduler',
    'DiffusionOutput',
    'NoiseInputs',
    'FeatureDiffusion',
    'FixedGamma',
    'LinearAutoencoder',
    'MLPDenoiser',
    'MLPNoiseAdapter',
    'NoiseAdapter',
]
