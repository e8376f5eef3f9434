"""Features of many channels as colours: what is alike looks alike."""

from typing import List, Sequence

import torch
from torch import Tensor

MAX_POSITIONS = 1024  # enough to find three directions among


class FeatureColours:
    """Colours of feature maps by the principal components of one of them.

    Its mean is grey; its first component goes from dark to bright, the second and third are hues. Features in the same
    colours point the same way, so two maps that are painted by the same object can be compared.

    Args:
        reference (Tensor): Feature map that the components are those of, (C, H, W).
    """

    def __init__(self, reference: Tensor):
        positions = reference.flatten(1).T.double()  # (H*W, C)
        positions = positions[:: -(-len(positions) // MAX_POSITIONS)]
        self.mean = positions.mean(0)
        _, scales, directions = torch.linalg.svd(positions - self.mean, full_matrices=False)
        directions, scales = directions[:3], scales[:3] / max(len(positions) - 1, 1) ** 0.5
        # a component's sign is arbitrary: without this, colours would flip from picture to picture
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        self.directions = directions * largest.sign()
        self.scales = scales.clamp_min(scales[0].item() / 100).clamp_min(1e-12)  # weaker ones are rounding errors

    def __call__(self, feature: Tensor) -> Tensor:
        """Paint a feature map.

        Args:
            feature (Tensor): (C, H, W).

        Returns:
            Tensor: RGB between 0 and 1, (H, W, 3); 2.5 standard deviations of the reference and more are the ends.
        """
        height, width = feature.shape[1:]
        parts = (feature.flatten(1).T.double() - self.mean) @ self.directions.T / self.scales / 5
        light, hues = parts[:, :1], torch.zeros(len(parts), 2, dtype=torch.double)
        hues[:, : parts.size(1) - 1] = parts[:, 1:]
        red, blue = hues[:, :1], hues[:, 1:]
        rgb = 0.5 + torch.cat([light + 0.7 * red, light - 0.35 * (red + blue), light + 0.7 * blue], 1)
        return rgb.clamp(0, 1).view(height, width, 3)


def error_maps(features: Sequence[Tensor], target: Tensor) -> List[Tensor]:
    """Root mean square over channels of the difference to a target.

    Args:
        features (list[Tensor]): (C, H, W) each.
        target (Tensor): (C, H, W).

    Returns:
        list[Tensor]: (H, W) each.
    """
    return [(feature - target).square().mean(0).sqrt() for feature in features]


def cosine_similarity(feature: Tensor, target: Tensor) -> float:
    """Cosine similarity of the channels, mean over positions.

    Args:
        feature (Tensor): (C, H, W).
        target (Tensor): (C, H, W).

    Returns:
        float: Between -1 and 1.
    """
    return torch.cosine_similarity(feature, target, dim=0).mean().item()
