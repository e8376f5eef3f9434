from typing import Optional

from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Count, Fraction, check_arguments

from .denoisers import Bottleneck


class _NoiseAdapter(nn.Module):
    """Base class of noise adapters, which predict gamma: the share of each student latent to keep.

    Noise is added with the weight 1 - gamma.
    """

    def __init__(self, channels: int, layers: nn.Module):
        super().__init__()
        self.layers = layers
        self.pred = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Predict gamma, (N, ), between 0 (only noise) and 1 (no noise), from student latents, (N, C, H, W)."""
        logits = self.pred(self.layers(x).mean(dim=(2, 3)))
        return logits.float().softmax(dim=1)[:, 0]


@MODELS.register_module()
class NoiseAdapter(_NoiseAdapter):
    """The paper's noise adapter for feature maps (equation 8).

    Args:
        channels (int): Latent channels, C.
        reduction (int): Channel reduction factor of the bottleneck. Defaults to 8.
    """

    @check_arguments
    def __init__(self, channels: int, reduction: Count = 8):
        super().__init__(channels, Bottleneck(channels, reduction))


@MODELS.register_module()
class MLPNoiseAdapter(_NoiseAdapter):
    """Noise adapter for logits and logit maps from the released code: 1x1 convolutions with C -> 2C -> C channels.

    Args:
        channels (int): Number of classes, C.
        expansion (int): Hidden channels as a multiple of C. Defaults to 2.
    """

    @check_arguments
    def __init__(self, channels: int, expansion: Count = 2):
        hidden = channels * expansion
        layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )
        super().__init__(channels, layers)


@MODELS.register_module()
class FixedGamma(nn.Module):
    """Constant gamma instead of a noise adapter, as in the paper's ablation of the adapter.

    Args:
        gamma (float): Share of each latent to keep, between 0 and 1. Defaults to 1, which adds no noise.
        channels (int, optional): Ignored. ``FeatureDiffusion`` passes it to every noise adapter. Defaults to None.

    Raises:
        ValueError: If gamma is not between 0 and 1.
    """

    @check_arguments
    def __init__(self, gamma: Fraction = 1.0, channels: Optional[int] = None):
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma, (N, ), for student latents (N, C, H, W)."""
        return x.new_full((x.size(0),), self.gamma).float()
