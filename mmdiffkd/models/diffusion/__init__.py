from .autoencoder import LinearAutoencoder
from .bottleneck import Bottleneck
from .conv_chain import ConvChain
from .ddim import DDIMSchedule
from .denoiser import BottleneckDenoiser, MLPDenoiser
from .feature_diffusion import DiffusionOutput, Draws, FeatureDiffusion
from .noise_adapter import FixedGamma, MLPNoiseAdapter, NoiseAdapter

__all__ = [
    'Bottleneck',
    'BottleneckDenoiser',
    'ConvChain',
    'DDIMSchedule',
    'DiffusionOutput',
    'Draws',
    'FeatureDiffusion',
    'FixedGamma',
    'LinearAutoencoder',
    'MLPDenoiser',
    'MLPNoiseAdapter',
    'NoiseAdapter',
]
