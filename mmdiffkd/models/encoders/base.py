"""Base class of the wrappers of image encoders, and their feature maps."""

from abc import abstractmethod
from math import log
from typing import List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, nn

from mmdiffkd.utils.validation import ConfigError

MIN_STRIDE = 4  # finer levels take much memory, and no student of OpenMMLab has them


class ImageFormat(NamedTuple):
    """The images on which a model was trained.

    Attributes:
        mean (list[float]): Mean of the red, green and blue values, which are from 0 to 1. Empty if it is not known.
        std (list[float]): Standard deviations.
        size (tuple[int, int]): Height and width.
        fits_size (bool): Whether the model has parts for this size, such as position embeddings.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: Tuple[int, int]
    fits_size: bool


class LibraryEncoder(nn.Module):
    """Base class of the wrappers of a library's models.

    A model without stages, such as a ViT, returns its last feature map by default; other models return the last map of
    each stride from 4. Class and register tokens are dropped, and tokens become maps.

    Args:
        name (str): Name of the model in its library.
        checkpoint (str, optional): ``'pretrained'`` for the weights that the library lists, a path or a URL. None
            leaves random weights. Defaults to None.
        out_indices (list[int], optional): Numbers of the feature maps to return, as the library counts them. Defaults
            to None.
        img_size (int, optional): Height and width of the images for which the model is built. Defaults to None, the
            size in the library.

    Attributes:
        example (str): Name of a model, for messages.
    """

    example = ''

    @classmethod
    @abstractmethod
    def image_format(cls, name: str) -> ImageFormat:
        """Return the images on which a model was trained; raises a ValueError for unknown names."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Return the feature maps, (N, C, H', W') each, of images, (N, 3, H, W)."""


def choose_levels(strides: Sequence[float], out_indices: Optional[Sequence[int]] = None) -> List[int]:
    """Choose the feature maps to return.

    Args:
        strides (list[float]): Image pixels per position of all maps that a model has, in order.
        out_indices (list[int], optional): The user's choice.

    Returns:
        list[int]: The last map of each stride from ``MIN_STRIDE``, or the user's choice, without negative numbers.

    Raises:
        ValueError: If the model does not have a chosen map.
    """
    count = len(strides)
    if out_indices is None:
        last = {round(stride): index for index, stride in enumerate(strides)}
        return sorted(index for stride, index in last.items() if stride >= MIN_STRIDE) or [count - 1]
    for index in out_indices:
        if not -count <= index < count:
            raise ConfigError('out_indices', f'={list(out_indices)} names map {index}, but the model has {count} maps.')
    return sorted({index % count for index in out_indices})


def channels_first(feature: Tensor, image_size: Sequence[int]) -> Tensor:
    """Permute a map (N, H, W, C) to (N, C, H, W). The aspect ratio of the images tells the layout."""
    ratio = image_size[0] / image_size[1]
    errors = [abs(log(feature.size(i) / feature.size(i + 1) / ratio)) for i in (1, 2)]
    return feature.permute(0, 3, 1, 2) if errors[0] < errors[1] else feature
