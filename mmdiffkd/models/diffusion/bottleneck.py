from torch import nn

from .conv_chain import Residual


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
