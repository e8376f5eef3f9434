from typing import Optional

from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from .denoisers import Bottleneck
from .recompute import ConvChain


class _NoiseAdapter(nn.Module):
    """Estimate per sample how much of the student feature to keep, gamma; 1 - gamma of it becomes noise."""

    def __init__(self, channels: int, layers: nn.Module):
        super().__init__()
        self.layers = layers
        self.pred = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map student latents (N, C, H, W) to gamma in (0, 1), (N, ); gamma = 1 adds no noise."""
        logits = self.pred(self.layers(x).mean(dim=(2, 3)))
        return logits.float().softmax(dim=1)[:, 0]


@MODELS.register_module()
class NoiseAdapter(_NoiseAdapter):
    """The paper's adaptive noise matching for feature maps (equation 8).

    Args:
        channels (int): Width of the latent features, C.
        reduction (int): Reduction of the bottleneck's inner width. Defaults to 8.
    """

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__(channels, Bottleneck(channels, reduction))


@MODELS.register_module()
class MLPNoiseAdapter(_NoiseAdapter):
    """The released code's adapter for logits, 1x1 convolutions C -> 2C -> C; also works on maps larger than 1x1.

    Args:
        channels (int): Number of classes, C.
        expansion (int): Width of the hidden layer over C. Defaults to 2.
    """

    def __init__(self, channels: int, expansion: int = 2):
        hidden = channels * expansion
        layers = ConvChain(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )
        super().__init__(channels, layers)


@MODELS.register_module()
class FixedGamma(nn.Module):
    """No noise adapter: the same share of every sample is kept, as in the paper's ablation of the adapter.

    Args:
        gamma (float): That share, between 0 and 1. Defaults to 1, which adds no noise.
        channels (int, optional): Width of the latent features; any will do.

    Raises:
        ValueError: If gamma is not between 0 and 1.
    """

    def __init__(self, gamma: float = 1.0, channels: Optional[int] = None):
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f'noise_adapter.gamma={gamma} must lie between 0, noise alone, and 1, which adds none.')
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        """Give gamma for every sample of (N, C, H, W), (N, )."""
        return x.new_full((x.size(0),), self.gamma).float()
