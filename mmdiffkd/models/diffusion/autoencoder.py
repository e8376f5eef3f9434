from typing import Tuple

from torch import Tensor, nn


class LinearAutoencoder(nn.Module):
    """Compress teacher features so that diffusion is cheap (paper, section 3).

    Args:
        in_channels (int): Teacher channels, C_t.
        latent_channels (int): Width of the latent, C.
    """

    def __init__(self, in_channels: int, latent_channels: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(in_channels, latent_channels, 1), nn.BatchNorm2d(latent_channels))
        self.decoder = nn.Conv2d(latent_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Encode and decode.

        Args:
            x (Tensor): Teacher feature, (N, C_t, H, W).

        Returns:
            tuple[Tensor, Tensor]: The latent (N, C, H, W) and the reconstruction (N, C_t, H, W).
        """
        latent = self.encoder(x)
        return latent, self.decoder(latent)
