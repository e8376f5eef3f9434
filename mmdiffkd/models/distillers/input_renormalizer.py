"""Convert the student's preprocessed images to images that are preprocessed as in the teacher's own training."""

import copy
from itertools import product
from math import ceil, gcd, isfinite, lcm
from numbers import Real
from typing import Annotated, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdiffkd.utils.check_config import ConfigError, Limits, check_value, in_key
from mmdiffkd.utils.config import type_name

from .batches import blank_sample

# Keys of the OpenMMLab packages' data preprocessors. The packages use different keys for the same setting.
COLOR_FLAGS = ('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb')
PAD_VALUES = ('pad_value', 'pad_val')
PAD_DIVISORS = ('pad_size_divisor', 'size_divisor')
# Keys that are removed before a preprocessor is built. The pixel map does not depend on them, and test_cfg needs data
# samples.
NOT_BUILT = ('batch_augments', 'test_cfg')
PREPROCESSOR_KEYS = ('mean', 'std', *COLOR_FLAGS, *PAD_VALUES, *PAD_DIVISORS, 'size')
GRAY_WEIGHTS = (0.114, 0.587, 0.299)  # weights of blue, green and red in a gray value, as in OpenCV
CHANNELS = (3, 1, 4, 6)  # numbers of channels of loaded images to try, in this order
USUAL_DIVISOR = 32  # all models accept images whose height and width are multiples of 32
GRAY = 'the teacher gets the gray values of the colors'
FIRST_THREE = 'the teacher gets the first three channels'
OVERRIDE = 'teacher=dict(data_preprocessor=dict({}))'


def check_preprocessor(cfg: Optional[dict]) -> None:
    """Check the values of a data preprocessor's config.

    Args:
        cfg (dict, optional): The config.

    Raises:
        ConfigError: If a value would give images that are not finite or too large for the memory, or if the class of
            the preprocessor refuses a value.
    """
    cfg = dict(cfg or {})
    if isinstance(cfg.get('data_preprocessor'), dict):
        with in_key('data_preprocessor'):
            check_preprocessor(cfg['data_preprocessor'])
    for key in ('mean', 'std', *PAD_VALUES):
        values = cfg.get(key)
        numbers = values if isinstance(values, (list, tuple)) else [values]
        if any(isinstance(value, Real) and not isfinite(value) for value in numbers):
            raise ConfigError(key, f'={values!r} must be finite.')
        if key == 'std' and any(isinstance(value, Real) and value <= 0 for value in numbers):
            raise ConfigError(key, f'={values!r} must be above 0.')
    for key in PAD_DIVISORS:
        if cfg.get(key) is not None:
            check_value(key, cfg[key], Annotated[int, Limits(0, 4096)])
    if cfg.get('type') is None:
        return
    try:
        MODELS.build({key: copy.deepcopy(value) for key, value in cfg.items() if key not in NOT_BUILT})
    except AssertionError as error:  # all other errors are ignored: the class may need more than its config
        raise ConfigError('', f' does not fit {type_name(cfg["type"])}: {error}.') from error
    except Exception:
        return


class PixelMap(NamedTuple):
    """Linear map by which a preprocessor converts a pixel: ``weight @ pixel + bias``.

    Attributes:
        weight (Tensor): Matrix (C_out, C_in), float64.
        bias (Tensor): Vector (C_out, ), float64.
    """

    weight: Tensor
    bias: Tensor


class Preprocessor:
    """The pixel map and the padding of a data preprocessor.

    The preprocessor is built and run on a few images of a single color, and the pixel map is computed from the results.
    This works for preprocessors of any class. The classes of the OpenMMLab packages differ: for example, some swap the
    colors only of images with three channels. If the config has no ``type``, or the class does not run on such images,
    the pixel map is computed from the keys ``mean``, ``std`` and color flags instead.

    Args:
        cfg (dict, optional): Config of the preprocessor.

    Attributes:
        outer_cfg (dict): The config as given.
        cfg (dict): Config of the innermost preprocessor: some preprocessors contain another one in the key
            ``data_preprocessor``. Otherwise the same as ``outer_cfg``.
        pad_value (float): Value of padded pixels, after normalization.
        pad_divisor (int): Number by which height and width of padded images are divisible.
        pad_size (tuple[int, int], optional): Height and width to which all images are padded.
        obstacle (str, optional): Reason why the pixel map is computed from the keys although the config has a ``type``.
    """

    def __init__(self, cfg: Optional[dict]):
        self.outer_cfg = outer = dict(cfg or {})
        self.cfg = outer
        while isinstance(self.cfg.get('data_preprocessor'), dict) and 'mean' not in self.cfg:
            self.cfg = self.cfg['data_preprocessor']
        self.obstacle: Optional[str] = None
        self._module: Optional[nn.Module] = None
        self._maps: Dict[int, Optional[PixelMap]] = {}
        if outer.get('type') is not None:
            self._build(copy.deepcopy(outer))
        self.pad_value = float(self._setting(PAD_VALUES) or 0)
        self.pad_divisor = max(1, int(self._setting(PAD_DIVISORS) or 1))
        size = self.cfg.get('size')
        self.pad_size: Optional[Tuple[int, int]] = (size, size) if isinstance(size, int) else size and tuple(size[-2:])

    def _build(self, cfg: dict) -> None:
        for key in NOT_BUILT:
            cfg.pop(key, None)
        try:
            self._module = MODELS.build(cfg)
            self._module.eval()
        except Exception as error:
            self.obstacle = f'its class cannot be built from this config ({error})'
            return
        if not any(self.pixel_map(channels) for channels in {*CHANNELS, self.num_values}):
            self.obstacle = 'its class fails on test images of a single color, or does not convert pixels linearly'
            self._module, self._maps = None, {}

    @property
    def fixed_pads(self) -> List[str]:
        """Names of the ``batch_augments`` that pad images."""
        augments = self.cfg.get('batch_augments')
        kinds = [cfg.get('type') for cfg in augments or () if isinstance(cfg, dict)]
        return [type_name(kind) for kind in kinds if kind is not None and 'Pad' in type_name(kind)]

    def _setting(self, names: Sequence[str]):
        """Return the value of a setting, under the first of the given names that exists; None if none exists.

        The setting is a key of the config, or else an attribute of the built preprocessor or of its submodules.
        """
        for name in names:
            if name in self.cfg:
                return self.cfg[name]
        for module in self._module.modules() if self._module is not None else ():
            for name in names:
                if getattr(module, name, None) is not None:
                    return getattr(module, name)
        return None

    def _values(self, key: str, default: float) -> Sequence[float]:
        """Return the values of ``mean`` or ``std``: one value per channel, or a single value for all channels."""
        values = self.cfg.get(key)
        values = (default,) if values is None else values
        return values if isinstance(values, (list, tuple)) else (values,)

    @property
    def num_values(self) -> int:
        """Number of values in ``mean``; 1 if the config has no ``mean``."""
        return len(self._values('mean', 0))

    def pixel_map(self, channels: int) -> Optional[PixelMap]:
        """Return the pixel map for images with a number of channels; None if the preprocessor refuses such images."""
        if channels not in self._maps:
            measured = self._module is not None
            self._maps[channels] = _measure(self._module, channels) if measured else self._map_of_keys(channels)
        return self._maps[channels]

    def is_raw(self, pixel_map: PixelMap) -> bool:
        """Return whether the config has no ``mean`` and the preprocessor does not scale or shift pixel values."""
        is_scaled = pixel_map.weight.abs().amax() != 1 or pixel_map.bias.any()
        return self.cfg.get('mean') is None and not is_scaled

    def _map_of_keys(self, channels: int) -> Optional[PixelMap]:
        mean, std = self._values('mean', 0), self._values('std', 1)
        width = max(len(mean), len(std), channels)
        if any(number not in (1, width) for number in (len(mean), len(std), channels)):
            return None
        order = list(range(channels))
        if channels == 3 and any(self.cfg.get(flag) for flag in COLOR_FLAGS):
            order = [2, 1, 0]
        elif channels == len(mean) == 6 and (self.cfg.get('bgr_to_rgb') or self.cfg.get('rgb_to_bgr')):
            order = [2, 1, 0, 5, 4, 3]  # six channels are two concatenated images, as in change detection
        weight = torch.eye(channels, dtype=torch.float64)[order].expand(width, channels)
        mean, std = (torch.tensor(values, dtype=torch.float64).expand(width) for values in (mean, std))
        return PixelMap(weight / std[:, None], -mean / std)


def _measure(module: nn.Module, channels: int) -> Optional[PixelMap]:
    """Compute the pixel map of a preprocessor by running it on images of a single color.

    Returns:
        PixelMap, optional: None if the preprocessor refuses images with this number of channels or is not linear.
    """
    unit = 255 * torch.eye(channels, dtype=torch.uint8)
    mixed = (torch.arange(channels) * 37 + 90).remainder(256).to(torch.uint8)
    colors = torch.stack([torch.zeros(channels, dtype=torch.uint8), *unit, mixed])
    images = colors[:, :, None, None].expand(-1, -1, 8, 8).contiguous()
    forms = images, list(images), [images.clone(), images.clone()]  # a batch, a list of images, a list of views
    for inputs, samples in product(forms, (None, [blank_sample(8, 8) for _ in images])):
        try:
            with torch.no_grad():
                output = module(dict(inputs=inputs, data_samples=samples), False)
            output = output['images'] if 'images' in output else output['inputs']
            while isinstance(output, (list, tuple)) or output.dim() == 5:
                output = output[0]
        except Exception:  # the preprocessor takes a different form of images, or a different number of channels
            continue
        if output.dim() != 4 or len(output) != len(colors) or min(output.shape[-2:]) < 8:
            continue
        pixels = output[:, :, 0, 0].double()
        bias = pixels[0]
        weight = ((pixels[1:-1] - bias) / 255).T
        is_linear = torch.allclose(weight @ mixed.double() + bias, pixels[-1], rtol=1e-4, atol=1e-3)
        return PixelMap(weight, bias) if is_linear else None
    return None


class InputRenormalizer:
    """Convert images that the student's preprocessor has made to the images that the teacher's would have made.

    Args:
        student (dict, optional): Config of the student's data preprocessor.
        teacher (dict, optional): Config of the teacher's data preprocessor.
        channels (tuple[int, int], optional): Number of channels of the student's and of the teacher's images. None
            finds the numbers when the first batch arrives. Defaults to None.
        pipeline (dict, optional): ``mean``, ``std`` and ``to_rgb`` of the teacher's training pipeline. An empty dict
            means that the pipeline does not normalize images. None means that the pipeline is unknown. Defaults to
            None.

    Attributes:
        notes (list[str]): Sentences for the log that describe conversions and assumptions. The sentence about swapped
            colors is ``color_note``.

    Raises:
        ValueError: If the teacher needs channels that the student's images do not have.
    """

    def __init__(
        self,
        student: Optional[dict],
        teacher: Optional[dict],
        channels: Optional[Tuple[int, int]] = None,
        pipeline: Optional[dict] = None,
    ):
        self.student, self.teacher = Preprocessor(student), Preprocessor(teacher)
        self._pipeline = Preprocessor(pipeline) if pipeline else None
        self._is_pipeline_known = pipeline is not None
        self.pad_divisor = self.teacher.pad_divisor
        self.notes: List[str] = []
        self._teacher_channels = channels and channels[1]
        self._channels: Optional[int] = None  # channels of the student's images for which the maps were computed
        if channels:
            self._set_up(channels[0])

    def _set_up(self, channels: int) -> None:
        """Compute the map from the student's preprocessed images to the teacher's preprocessed images."""
        maps = [self.student.pixel_map(loaded) for loaded in (channels, *CHANNELS)]
        ours = next((found for found in maps if found is not None and len(found.bias) == channels), None)
        identity = PixelMap(torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))
        if ours is None:
            self.student.obstacle = self.student.obstacle or f'its class does not return images of {channels} channels'
            ours = identity
        self._channels, self._student_map = channels, ours
        self._uses_pipeline, adaptation = False, None
        if self.student.outer_cfg == self.teacher.outer_cfg and self._teacher_channels in (None, channels):
            self.weight, self.bias = identity
            self._student_is_raw = self._teacher_is_raw = self.student.is_raw(ours)
        else:
            adaptation, theirs = self._teacher_map(ours)
            for side, pixel_map in (('student', ours), ('teacher', theirs)):
                if not all(values.isfinite().all() for values in pixel_map):
                    raise ValueError(
                        f"The {side}'s data_preprocessor does not make finite values: its std must not contain 0."
                    )
            self.weight = theirs.weight @ torch.linalg.pinv(ours.weight)
            self.bias = theirs.bias - self.weight @ ours.bias
            if not torch.allclose(self.weight @ ours.weight, theirs.weight, rtol=1e-4, atol=1e-6):
                raise ValueError(
                    "The student's data_preprocessor drops channels that the teacher needs: keep all channels, or "
                    "choose a teacher that takes the student's images."
                )
        self._keeps_channels = self.weight.size(0) == channels
        self.is_identity = (
            self._keeps_channels
            and torch.allclose(self.weight, identity.weight, rtol=0, atol=1e-5)
            and bool((self.bias.abs() < 1e-4).all())
        )
        self.notes = list(self._describe(adaptation))

    def _teacher_map(self, ours: PixelMap) -> Tuple[Optional[str], PixelMap]:
        """Find the map from loaded pixels to the teacher's preprocessed pixels.

        Args:
            ours (PixelMap): Pixel map of the student's preprocessor.

        Returns:
            tuple[str or None, PixelMap]: Description of the change in the number of channels, or None if the number
            does not change, and the map.
        """
        loaded = ours.weight.size(1)
        wanted = self._teacher_channels or self.teacher.num_values
        for description, adapt in _adaptations(loaded, self._loads_rgb):
            found = self.teacher.pixel_map(len(adapt))
            made = 0 if found is None else len(found.bias)
            is_wanted = made == wanted or (made and wanted == 1 and not self._teacher_channels)
            if not is_wanted or (made > 3 and len(adapt) == 1) or (description == GRAY and made != 1):
                continue
            self._teacher_is_raw, self._student_is_raw = self.teacher.is_raw(found), self.student.is_raw(ours)
            first = self._pipeline and self._pipeline.pixel_map(len(adapt))
            self._uses_pipeline = bool(first) and self._teacher_is_raw and not self._student_is_raw
            if self._uses_pipeline:
                found = PixelMap(found.weight @ first.weight, found.weight @ first.bias + found.bias)
            return description, PixelMap(found.weight @ adapt, found.bias)
        raise ValueError(
            f'The student loads images of {loaded} channels, but the teacher takes {wanted}: choose a teacher for '
            f'{loaded} channels, or describe its images in {OVERRIDE.format("...")}.'
        )

    @property
    def _loads_rgb(self) -> bool:
        return bool(self.student.cfg.get('rgb_to_bgr'))

    def _describe(self, adaptation: Optional[str]) -> Iterator[str]:
        """Yield sentences for the log about conversions and assumptions."""
        for side, name in ((self.student, 'student'), (self.teacher, 'teacher')):
            if side.obstacle and self.student.outer_cfg != self.teacher.outer_cfg:
                yield (
                    f"Only the keys mean, std and color flags of the {name}'s data_preprocessor are used, because "
                    f'{side.obstacle}.'
                )
        if adaptation or self._student_map.weight.size(1) > self.weight.size(0):
            yield (
                f'The student loads images of {self._student_map.weight.size(1)} channels and the teacher takes '
                f'{self.weight.size(0)}: {adaptation or FIRST_THREE}.'
            )
        if self._uses_pipeline:
            yield "The teacher's images are normalized as in the pipeline of its config."
        elif self._student_is_raw and self._pipeline:
            yield (
                "The teacher's pipeline normalizes images, and the student's pipeline is assumed to normalize them in "
                f'the same way. If it does not, set {OVERRIDE.format("mean=..., std=...")}.'
            )
        elif self._student_is_raw and self._teacher_is_raw and not self._is_pipeline_known:
            yield (
                'Neither data_preprocessor has mean and std: the teacher is assumed to take the same values as the '
                f'student. If it does not, set {OVERRIDE.format("mean=..., std=...")}.'
            )
        elif self._student_is_raw != self._teacher_is_raw and (self._student_is_raw or not self._is_pipeline_known):
            yield (
                f"The {'student' if self._student_is_raw else 'teacher'}'s data_preprocessor has no mean and std: it "
                'is assumed to take values from 0 to 255. If a pipeline normalizes images, set the mean and std of the '
                f"teacher's images in {OVERRIDE.format('mean=..., std=...')}."
            )
        pads = self.teacher.fixed_pads
        if pads and pads != self.student.fixed_pads:
            yield (
                f"The teacher's batch_augments ({', '.join(pads)}) are not applied: the teacher gets images of the "
                "student's size. To pad both, add them to the student's data_preprocessor."
            )
        if self.teacher.pad_size and self.teacher.pad_size != self.student.pad_size:
            yield (
                f"The teacher's images are padded to at least {self.teacher.pad_size}, as its data_preprocessor does. "
                f'To turn this off, set {OVERRIDE.format("size=None")}.'
            )

    @property
    def color_note(self) -> Optional[str]:
        """Sentence for the log about swapped colors; None if teacher and student get the same color order."""
        order = self.weight.abs().argmax(1).tolist()
        if not self._keeps_channels or order == list(range(len(order))):
            return None
        return (
            'The colors are swapped for the teacher, because one data_preprocessor swaps RGB and BGR and the other '
            'does not. This assumes that student and teacher load images in the same order, such as the BGR of '
            "OpenMMLab's LoadImageFromFile. If the student loads RGB, as CIFAR data sets do, set "
            f'{self.color_override()}.'
        )

    def color_override(self) -> str:
        """Return the setting that inverts the color flag of the teacher's preprocessor, for messages."""
        cfg = self.teacher.cfg
        active = [flag for flag in COLOR_FLAGS if cfg.get(flag)]
        spelled = [flag for flag in COLOR_FLAGS if flag in cfg]
        usual = 'to_rgb' if 'Cls' in str(cfg.get('type')) else 'bgr_to_rgb'
        return OVERRIDE.format(f'{(active or spelled or [usual])[0]}={not active}')

    def override_for(self, student_pipeline: dict, teacher_pipeline: Optional[dict]) -> Optional[str]:
        """Return the setting that the teacher needs if the student's pipeline normalizes images.

        Args:
            student_pipeline (dict): ``mean``, ``std`` and ``to_rgb`` of the student's pipeline.
            teacher_pipeline (dict, optional): ``mean``, ``std`` and ``to_rgb`` of the teacher's pipeline.

        Returns:
            str, optional: Value of ``teacher.data_preprocessor``, as text. None if no setting is needed, or if the
            right setting is unknown.
        """
        if not self._student_is_raw or self._channels != 3:
            return None
        wanted = self.teacher.pixel_map(3)
        if teacher_pipeline and self._teacher_is_raw:
            wanted = Preprocessor(teacher_pipeline).pixel_map(3)
        made = Preprocessor(student_pipeline).pixel_map(3)
        if wanted is None or made is None or len(wanted.bias) != 3:
            return None
        weight = wanted.weight @ made.weight.inverse()
        bias = wanted.bias - weight @ made.bias
        if torch.allclose(weight, torch.eye(3, dtype=torch.float64), atol=1e-4) and bias.abs().max() < 1e-3:
            return None
        std = 1 / weight.abs().amax(1)
        flag = self.color_override().split('dict(')[-1].split('=')[0]
        numbers = [[round(value, 6) for value in values.tolist()] for values in (-bias * std, std)]
        is_swapped = bool(weight[0].abs().argmax() == 2)
        return OVERRIDE.format(f'mean={numbers[0]}, std={numbers[1]}, {flag}={is_swapped}')

    def __call__(self, inputs: Tensor, data_samples: Optional[Sequence] = None) -> Tensor:
        """Convert a batch of images, and pad it as the teacher's preprocessor does.

        If the images need no change, the batch is returned unchanged.

        Args:
            inputs (Tensor): The student's preprocessed images, (N, C, H, W).
            data_samples (list, optional): Data samples of the images. Their ``img_shape`` is the image size without
                padding.

        Returns:
            Tensor: The teacher's images, (N, C', H', W'). Padding is added at the bottom and on the right.
        """
        if self._channels != inputs.size(1):
            self._set_up(inputs.size(1))
        images = inputs if self.is_identity else _apply(self.weight, self.bias, inputs)
        if not self.is_identity or self.student.pad_value != self.teacher.pad_value:
            images = self._fill_padding(images, inputs, data_samples)
        height, width = self.padded_size(inputs.shape[-2:])
        if (height, width) != tuple(inputs.shape[-2:]):
            padding = (0, width - inputs.size(3), 0, height - inputs.size(2))
            images = F.pad(images, padding, value=self.teacher.pad_value)
        return images

    def find_padding(self, infer_divisor: Callable[[int], int]) -> None:
        """Set ``pad_divisor``, the number by which height and width of the teacher's images must be divisible.

        Args:
            infer_divisor (callable): Takes the divisor in the teacher's config, and returns the divisor that the
                teacher needs. Called only if the teacher may need more padding than its config says.
        """
        declared = self.teacher.pad_divisor
        if self.student.pad_size:
            divisor = gcd(*self.student.pad_size)
        else:
            divisor = self.student.pad_divisor
        if lcm(declared, divisor) % USUAL_DIVISOR:
            self.pad_divisor = infer_divisor(declared)
        if divisor % self.pad_divisor:
            self.notes.append(
                f"The teacher's images are padded to multiples of {self.pad_divisor} pixels, and its features are "
                "cropped to the size of the student's images."
            )

    def turn_off_padding(self) -> None:
        """Do not pad the teacher's images. Used if the images are resized to a size that the teacher accepts."""
        self.pad_divisor, self.teacher.pad_size = 1, None

    def padded_size(self, size: Sequence[int]) -> Tuple[int, int]:
        """Return the height and width of the teacher's padded images.

        Args:
            size (tuple[int, int]): Height and width of the student's images.
        """
        height, width = map(max, zip(size, self.teacher.pad_size or (0, 0)))
        return tuple(ceil(side / self.pad_divisor) * self.pad_divisor for side in (height, width))

    def _fill_padding(self, images: Tensor, inputs: Tensor, data_samples: Optional[Sequence]) -> Tensor:
        """Set the padded pixels of the student's images to the teacher's pad value."""
        shapes = [getattr(sample, 'metainfo', {}).get('img_shape') for sample in data_samples or ()]
        height, width = inputs.shape[-2:]
        if all(shape is None or (shape[0] >= height and shape[1] >= width) for shape in shapes):
            return images
        # img_shape is wrong if a transform has changed the image size without updating it, so check the pixels as well
        is_padding = (inputs == self.student.pad_value).all(1, keepdim=True)
        is_padding[len(shapes) :] = False
        for mask, shape in zip(is_padding, shapes):
            mask[:, : shape[0] if shape else None, : shape[1] if shape else None] = False
        return images.masked_fill(is_padding, self.teacher.pad_value)

    def check_range(self, inputs: Tensor, data_samples: Optional[Sequence] = None) -> Optional[str]:
        """Check that the student's images were loaded with values from 0 to 255.

        The check ignores padding. It accepts dark images, whose values are small integers.

        Args:
            inputs (Tensor): The student's preprocessed images, (N, C, H, W).
            data_samples (list, optional): Data samples of the images. Their ``img_shape`` is the image size without
                padding.

        Returns:
            str, optional: A warning; None if the values are as expected.
        """
        if self.is_identity and not (self._student_is_raw and self._is_pipeline_known and not self._pipeline):
            return None
        is_image = (inputs != self.student.pad_value).any(1)
        for mask, sample in zip(is_image, data_samples or ()):
            height, width = getattr(sample, 'metainfo', {}).get('img_shape', mask.shape)[:2]
            mask[height:], mask[:, width:] = False, False
        values = self._loaded(inputs).movedim(1, -1)[is_image]
        if not values.numel():
            return None
        low, high = (value.item() for value in values.aminmax())
        is_dark = low > -1 and (1.5 < high <= 16 or high < 0.5) and (values - values.round()).abs().max() < 0.02
        if is_dark or _has_usual_range(low, high):
            return None
        return (
            f"The student's data_preprocessor gets values from {low:.3g} to {high:.3g} instead of 0 to 255: the "
            'pipeline may normalize images, or they have more than 8 bits, or the first batch is very dark. The '
            'teacher gets the same values through its own data_preprocessor. If this is wrong, set '
            f'{OVERRIDE.format("mean=..., std=...")}.'
        )

    def _loaded(self, inputs: Tensor) -> Tensor:
        """Return the images as they were loaded, by inverting the student's preprocessor."""
        if self._channels != inputs.size(1):
            self._set_up(inputs.size(1))
        inverse = torch.linalg.pinv(self._student_map.weight)
        return _apply(inverse, -inverse @ self._student_map.bias, inputs.float())

    def displayed(self, inputs: Tensor) -> Tensor:
        """Convert the student's preprocessed images to RGB for display.

        If the images have more than three channels, the first three are displayed. Images whose values do not fit the
        range from 0 to 255 are rescaled.

        Args:
            inputs (Tensor): Preprocessed images, (N, C, H, W).

        Returns:
            Tensor: RGB between 0 and 1, (N, 3, H, W).
        """
        images = self._loaded(inputs)
        images = images[:, :3] if images.size(1) >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        images = images if self._loads_rgb else images.flip(1)
        low, high = images.aminmax()
        if not _has_usual_range(low.item(), high.item()):
            images = 255 * (images - low) / (high - low).clamp_min(1e-6)
        return (images / 255).clamp(0, 1)


def _has_usual_range(low: float, high: float) -> bool:
    """Return whether a range fits values from 0 to 255, which augmentations of the brightness may have changed."""
    return low > -128 and 16 < high < 512


def _adaptations(channels: int, is_rgb: bool) -> List[Tuple[Optional[str], Tensor]]:
    """Return the ways to adapt the number of channels of loaded images to the teacher.

    Args:
        channels (int): Number of channels of the loaded images.
        is_rgb (bool): Whether the images are RGB instead of BGR.

    Returns:
        list[tuple[str or None, Tensor]]: A description and a matrix (C_out, C_in) for each way. The first is the
        identity, with the description None.
    """
    eye = torch.eye(channels, dtype=torch.float64)
    found = [(None, eye)]
    if channels == 1:
        found.append(('the gray channel is repeated for the teacher', eye.expand(3, 1)))
    if channels >= 3:
        gray = torch.zeros(1, channels, dtype=torch.float64)
        gray[0, :3] = torch.tensor(GRAY_WEIGHTS[::-1] if is_rgb else GRAY_WEIGHTS)
        if channels > 3:
            found.append((FIRST_THREE, eye[:3]))
        else:
            found.append((GRAY, gray))
    return found


def _apply(weight: Tensor, bias: Tensor, images: Tensor) -> Tensor:
    """Apply a pixel map. Avoids a matrix product, because autocast would compute it in low precision."""
    outputs = []
    for row, offset in zip(weight.tolist(), bias.tolist()):
        parts = [images[:, i] * value for i, value in enumerate(row) if abs(value) > 1e-9]
        outputs.append(sum(parts[1:], parts[0]) + offset if parts else torch.full_like(images[:, 0], offset))
    return torch.stack(outputs, 1)
