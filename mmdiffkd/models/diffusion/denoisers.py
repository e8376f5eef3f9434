from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import Count, check_arguments


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, used by the denoiser and the noise adapter.

    Unlike in a ResNet bottleneck, the convolutions have a bias, and no activation follows the residual sum.

    Args:
        channels (int): Input and output channels, C.
        reduction (int): Channel reduction factor. The 3x3 convolution has ``max(1, C // reduction)`` channels.
    """

    def __init__(self, channels: int, reduction: int):
        hidden = max(1, channels // reduction)
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return x + self.layers(x)


class _Denoiser(nn.Module):
    """Base class of denoisers: add a learned timestep embedding to the input, then apply ``layers``."""

    def __init__(self, channels: int, num_train_timesteps: int, layers: nn.Module):
        super().__init__()
        self.time_embedding = nn.Embedding(num_train_timesteps, channels)
        self.layers = layers

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the scheduler's training target, which is the noise by default.

        Args:
            x (Tensor): Noisy features, (N, C, H, W).
            timesteps (Tensor): Integer timesteps, (N, ), or (1, ) if the whole batch has the same timestep.

        Returns:
            Tensor: Prediction, (N, C, H, W).
        """
        return self.layers(x + self.time_embedding(timesteps)[..., None, None])


@MODELS.register_module()
class BottleneckDenoiser(_Denoiser):
    """The paper's lightweight denoiser for feature maps (section 3).

    At 256 channels, the denoiser has 0.21 M parameters, not counting the timestep embedding.

    Args:
        channels (int): Latent channels, C.
        num_train_timesteps (int): Number of timestep embeddings. Defaults to 1000.
        num_blocks (int): Number of bottleneck blocks. Defaults to 2.
        reduction (int): Channel reduction factor of the blocks; see :class:`Bottleneck`. Defaults to 4.
    """

    @check_arguments
    def __init__(self, channels: int, num_train_timesteps: int = 1000, num_blocks: Count = 2, reduction: Count = 4):
        blocks = [Bottleneck(channels, reduction) for _ in range(num_blocks)]
        layers = nn.Sequential(*blocks, nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        super().__init__(channels, num_train_timesteps, layers)


@MODELS.register_module()
class MLPDenoiser(_Denoiser):
    """Denoiser for logits from the released code: 1x1 convolutions with C -> 4C -> C -> 4C -> C channels.

    Args:
        channels (int): Number of classes, C.
        num_train_timesteps (int): Number of timestep embeddings. Defaults to 1000.
        expansion (int): Hidden channels as a multiple of C. Defaults to 4.
    """

    @check_arguments
    def __init__(self, channels: int, num_train_timesteps: int = 1000, expansion: Count = 4):
        hidden = channels * expansion
        layers = nn.Sequential(
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
