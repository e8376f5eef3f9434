from typing import Tuple

from torch import Tensor, nn


class LinearAutoencoder(nn.Module):
    """Linear autoencoder that compresses teacher features to make diffusion cheaper (paper, section 3).

    Args:
        in_channels (int): Teacher channels, C_t.
        latent_channels (int): Latent channels, C.
    """

    def __init__(self, in_channels: int, latent_channels: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(in_channels, latent_channels, 1), nn.BatchNorm2d(latent_channels))
        self.decoder = nn.Conv2d(latent_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Encode and reconstruct teacher features.

        Args:
            x (Tensor): Teacher features, (N, C_t, H, W).

        Returns:
            tuple[Tensor, Tensor]: The latent (N, C, H, W) and the reconstruction (N, C_t, H, W).
        """
        latent = self.encoder(x)
        return latent, self.decoder(latent)
