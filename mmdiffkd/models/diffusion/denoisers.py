from torch import Tensor, nn

from mmdiffkd.registry import MODELS

from .recompute import ConvChain, Residual


class Bottleneck(Residual):
    """Residual bottleneck of the denoiser and the noise adapter: 1x1, 3x3, 1x1 convolutions.

    Unlike a ResNet's, it keeps the convolutions' bias and has no activation after the sum.

    Args:
        channels (int): Width of input and output, C.
        reduction (int): The inner width is ``max(1, C // reduction)``.
    """

    def __init__(self, channels: int, reduction: int):
        hidden = max(1, channels // reduction)
        super().__init__(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )


class _Denoiser(nn.Module):
    """Predict the noise in a feature: a learned embedding of the timestep is added, ``layers`` do the rest."""

    def __init__(self, channels: int, num_train_timesteps: int, layers: nn.Module):
        super().__init__()
        self.time_embedding = nn.Embedding(num_train_timesteps, channels)
        self.layers = layers

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Predict eps.

        Args:
            x (Tensor): Noisy feature, (N, C, H, W).
            timesteps (Tensor): Integers of shape (N, ) or (1, ).

        Returns:
            Tensor: Predicted noise, (N, C, H, W).
        """
        return self.layers(x + self.time_embedding(timesteps)[..., None, None])


@MODELS.register_module()
class BottleneckDenoiser(_Denoiser):
    """The paper's light-weight denoiser for feature maps (section 3): 0.21 M parameters at 256 channels.

    Args:
        channels (int): Width of the latent features, C.
        num_train_timesteps (int): Number of rows of the time embedding. Defaults to 1000.
        num_blocks (int): Number of bottleneck blocks. Defaults to 2.
        reduction (int): Reduction of their inner width. Defaults to 4.
    """

    def __init__(self, channels: int, num_train_timesteps: int = 1000, num_blocks: int = 2, reduction: int = 4):
        blocks = [Bottleneck(channels, reduction) for _ in range(num_blocks)]
        layers = ConvChain(*blocks, nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        super().__init__(channels, num_train_timesteps, layers)


@MODELS.register_module()
class MLPDenoiser(_Denoiser):
    """The released code's denoiser for logits: 1x1 convolutions C -> 4C -> C -> 4C -> C.

    Args:
        channels (int): Number of classes, C.
        num_train_timesteps (int): Number of rows of the time embedding. Defaults to 1000.
        expansion (int): Width of the hidden layers over C. Defaults to 4.
    """

    def __init__(self, channels: int, num_train_timesteps: int = 1000, expansion: int = 4):
        hidden = channels * expansion
        layers = ConvChain(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
        )
        super().__init__(channels, num_train_timesteps, layers)
