"""Base class of the wrappers for image encoders of timm, torchvision and transformers."""

from abc import abstractmethod
from math import log
from typing import List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

from mmdiffkd.utils.check_config import ConfigError

MIN_STRIDE = 4  # feature maps with smaller strides need much memory, and students of OpenMMLab do not have such maps


class ImageFormat(NamedTuple):
    """Format of the images on which a model was trained.

    Attributes:
        mean (list[float]): Mean of the red, green and blue values, on a scale from 0 to 1. Empty if unknown.
        std (list[float]): Standard deviation of the red, green and blue values, on the same scale. Empty if unknown.
        size (tuple[int, int]): Height and width.
        fits_size (bool): Whether the model is built for this image size, for example with position embeddings.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: Tuple[int, int]
    fits_size: bool


class LibraryEncoder(nn.Module):
    """Base class of the wrappers for image encoders of a library: timm, torchvision or transformers.

    By default, a model without stages, such as a ViT, returns only its last feature map. A model with stages returns
    the last map of each stride of at least 4. Class and register tokens are dropped, and all other tokens become maps.

    Args:
        name (str): Name of the model in its library.
        checkpoint (str, optional): Path or URL of weights, or ``'pretrained'`` for the weights that the library lists
            for the model. None leaves random weights. Defaults to None.
        out_indices (list[int], optional): Indices of the feature maps to return; see the subclasses. None returns the
            default maps. Defaults to None.
        img_size (int, optional): Height and width of the images for which the model is built. None uses the size in the
            library. Defaults to None.

    Attributes:
        example (str): Name of one of the library's models, for messages.
    """

    example = ''

    @classmethod
    @abstractmethod
    def image_format(cls, name: str) -> ImageFormat:
        """Return the format of the images on which a model was trained. Raises an error if the name is unknown."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Return the feature maps, (N, C, H', W') each, of images, (N, 3, H, W)."""


def choose_levels(strides: Sequence[float], out_indices: Optional[Sequence[int]] = None) -> List[int]:
    """Choose the feature maps that a model returns.

    Args:
        strides (list[float]): Strides of all maps that the model has, in order.
        out_indices (list[int], optional): Indices of the maps that the user has chosen. Negative indices count from the
            end. None chooses the last map of each stride of at least ``MIN_STRIDE``.

    Returns:
        list[int]: Sorted indices of the chosen maps, none of them negative.

    Raises:
        ValueError: If an index in ``out_indices`` is out of range.
    """
    count = len(strides)
    if out_indices is None:
        last = {round(stride): index for index, stride in enumerate(strides)}
        return sorted(index for stride, index in last.items() if stride >= MIN_STRIDE) or [count - 1]
    for index in out_indices:
        if not -count <= index < count:
            problem = f'={list(out_indices)} contains {index}, but the model has only the maps 0 to {count - 1}.'
            raise ConfigError('out_indices', problem)
    return sorted({index % count for index in out_indices})


def channels_first(feature: Tensor, image_size: Sequence[int]) -> Tensor:
    """Permute a map to (N, C, H, W) if it is (N, H, W, C).

    The dimensions whose ratio is closer to the aspect ratio of the images are height and width.
    """
    ratio = image_size[0] / image_size[1]
    errors = [abs(log(feature.size(i) / feature.size(i + 1) / ratio)) for i in (1, 2)]
    return feature.permute(0, 3, 1, 2) if errors[0] < errors[1] else feature
