"""Resize the student's images to the size that the teacher needs, and resize the teacher's features back."""

from math import prod
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdiffkd.utils.check_config import ConfigError
from mmdiffkd.utils.meta_device import QuickMeta

from .feature_info import FeatureInfo, forward_fns
from .recorders import ModuleOutputsRecorder

Size = Tuple[int, int]
TRIAL_SIDE = 160  # smallest height and width of the images in the dry runs of find_size_divisor()


class InputResizer:
    """Resize the student's images for the teacher, and the teacher's features to their size for the original images.

    Args:
        resize (float or str, optional): Factor by which height and width are multiplied. ``'native'`` resizes images to
            the area of the images on which the teacher was trained. None keeps the size, rounded to multiples of
            ``divisor``. A teacher that accepts only the native size always gets that size.
        native (tuple[int, int]): Height and width of the images on which the teacher was trained.
        divisor (int, optional): Number by which height and width of the teacher's images must be divisible. None means
            that the teacher accepts only images of the native size.
        name (str): Name of the teacher for messages.

    Raises:
        ConfigError: If a factor is set for a teacher that accepts images of only one size.
    """

    def __init__(self, resize: Union[float, str, None], native: Size, divisor: Optional[int], name: str):
        self.resize, self.native, self.divisor = resize, tuple(native), divisor
        if divisor is None and isinstance(resize, (int, float)):
            raise ConfigError(
                'resize',
                f'={resize:g}: {name} takes images of {_text(native)} only; remove resize, or use another model.',
            )

    def size(self, size: Sequence[int]) -> Size:
        """Return the height and width of the teacher's images.

        Args:
            size (tuple[int, int]): Height and width of the student's images.
        """
        if self.divisor is None:
            return self.native
        factor = self.resize or 1
        if self.resize == 'native':
            factor = (prod(self.native) / prod(size)) ** 0.5
        return tuple(max(1, round(side * factor / self.divisor)) * self.divisor for side in size)

    def __call__(self, images: Tensor) -> Tensor:
        """Resize images, (N, C, H, W), for the teacher. Images of the right size are returned unchanged."""
        return _interpolate(images, self.size(images.shape[-2:]))

    def restore(self, feature: Optional[Tensor], stride: Optional[float], size: Sequence[int]) -> Optional[Tensor]:
        """Resize a feature map of the teacher to the size that it would have for images of the student's size.

        Args:
            feature (Tensor, optional): Feature map, (N, C, H', W'). None and vectors are returned unchanged.
            stride (float, optional): Image pixels per feature pixel; None for vectors.
            size (tuple[int, int]): Height and width of the student's images.
        """
        if feature is None or stride is None:
            return feature
        return _interpolate(feature, [max(1, -int(-side // stride)) for side in size])

    @property
    def notes(self) -> List[str]:
        """Sentences for the log that describe how images and features are resized."""
        return list(self._describe())

    def _describe(self) -> Iterator[str]:
        if self.divisor is None:
            size = _text(self.native)
            yield f"The teacher takes images of {size} only: the student's images are resized to {size}."
            return
        rounded = f', with sides rounded to multiples of {self.divisor} pixels' if self.divisor > 1 else ''
        if self.resize == 'native':
            yield (
                "The student's images are resized for the teacher to the same area as the teacher's training images "
                f"({_text(self.native)}){rounded}. The teacher's features are resized to the size of the student's "
                'levels.'
            )
        elif self.resize is not None:
            yield (
                f"The student's images are resized for the teacher by a factor of {self.resize:g}{rounded}. The "
                "teacher's features are resized to the size of the student's levels."
            )


def _text(size: Sequence[int]) -> str:
    return f'{size[0]}x{size[1]}'


def _interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps, (N, C, H, W). Downsampling averages over all positions."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    is_smaller = any(new < old for new, old in zip(size, maps.shape[-2:]))
    return F.interpolate(maps.float(), tuple(size), mode='bilinear', align_corners=False, antialias=is_smaller)


@torch.no_grad()
def find_size_divisor(model: nn.Module, taps: Dict[str, FeatureInfo], native: Size) -> Optional[int]:
    """Find the number by which height and width of an encoder's images must be divisible, in dry runs.

    A divisor is accepted if the model runs on such images and its feature maps cover the whole images. Some models drop
    the pixels of incomplete patches at the border.

    Args:
        model (nn.Module): An encoder on the meta device, in eval mode.
        taps (dict[str, FeatureInfo]): Taps of the encoder.
        native (tuple[int, int]): Height and width of the images on which the encoder was trained.

    Returns:
        int, optional: The divisor. None if the encoder runs only on images of the native size.
    """
    strides = {round(stride) for info in taps.values() for stride in info.strides if stride}
    ran = None
    for divisor in dict.fromkeys([*sorted({1, *strides, 32, 64}), *native]):
        count = -(-TRIAL_SIDE // divisor) | 1  # odd, so that no number greater than divisor divides both sides
        size = (167, 181) if divisor == 1 else (divisor * count, divisor * (count + 2))
        covers = _covers(model, taps, size)
        if covers:
            return divisor
        ran = divisor if covers is False and ran is None else ran
    if ran is None and _covers(model, taps, native) is None:  # the model does not run on the meta device at all
        return max(strides, default=1) if len(strides) == 1 else 1
    return ran


def _covers(model: nn.Module, taps: Dict[str, FeatureInfo], size: Size) -> Optional[bool]:
    """Return whether the feature maps cover the whole images; None if the model does not run on images of this size."""
    info = next(iter(taps.values()))
    images = torch.zeros(2, info.image_channels, *size, device='meta')
    calls = {path: tap.calls for path, tap in taps.items()}
    try:
        with QuickMeta(), ModuleOutputsRecorder(model, calls, 'teacher', stop_after=calls) as recorder:
            forward_fns(model)[info.forward_fn](images, None)
        maps = [
            (level, stride)
            for path, tap in taps.items()
            for level, stride in zip(recorder.features(path, size, tap.tokens), tap.strides)
            if level is not None and stride
        ]
    except Exception:
        return None
    return all(cells >= side / stride - 1e-3 for level, stride in maps for cells, side in zip(level.shape[-2:], size))
