"""Image encoders of other libraries as teachers: configs, imports, levels, and errors about weights."""

from abc import abstractmethod
from contextlib import suppress
from importlib import import_module
from math import log
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from mmengine.config import Config
from mmengine.utils import digit_version
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.config import type_name
from mmdiffkd.utils.validation import ConfigError, build_part, check_arguments, get_class, one_line

PRETRAINED = 'pretrained'  # value of teacher.checkpoint: the weights that the library lists for the model
CGROUP = Path('/sys/fs/cgroup')  # limits of the container
MIN_STRIDE = 4  # finer levels take much memory, and no student of OpenMMLab has them


class Library(NamedTuple):
    """A library of image encoders.

    Attributes:
        encoder (str): Class that wraps its models.
        oldest (str): Oldest version with the needed functions.
    """

    encoder: str
    oldest: str


LIBRARIES = dict(
    timm=Library('TimmEncoder', '1.0.9'),
    torchvision=Library('TorchvisionEncoder', '0.15'),
    transformers=Library('TransformersEncoder', '4.48'),
)


def import_library(name: str):
    """Import a library.

    Args:
        name (str): Key of ``LIBRARIES``.

    Raises:
        ModuleNotFoundError, ImportError: If it is not installed, too old, or does not import.
    """
    cure = f"pip install '{name}>={LIBRARIES[name].oldest}'"
    try:
        library = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ImportError(f'The package {name} does not import: {one_line(error)}') from error
        raise ModuleNotFoundError(
            f"A teacher '{name}::...' needs the package {name}, which is not installed: {cure}.", name=name
        ) from error
    if digit_version(library.__version__) < digit_version(LIBRARIES[name].oldest):
        raise ImportError(
            f"A teacher '{name}::...' needs {name} {LIBRARIES[name].oldest} or newer, but {library.__version__} is "
            f'installed: {cure}.'
        )
    return library


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


def is_library_source(source: Union[str, dict]) -> bool:
    """Return whether a teacher's config names a model of a library: ``'timm::NAME'``, or the dict of a backbone."""
    if isinstance(source, dict):
        return 'model' not in source and _library_encoder(source) is not None
    return str(source).partition('::')[0] in LIBRARIES and '::' in str(source)


def _library_encoder(cfg) -> Optional[type]:
    """Return the class of a backbone's config if it wraps a model of a library."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    if isinstance(kind, str) and type_name(kind) in {library.encoder for library in LIBRARIES.values()}:
        kind = get_class(MODELS, f'mmdiffkd.{type_name(kind)}')
    return kind if isinstance(kind, type) and issubclass(kind, LibraryEncoder) else None


def is_encoder(model_cfg: dict) -> bool:
    """Return whether the config is one of an :class:`EncoderTeacher`, a teacher without a task."""
    return type_name(model_cfg.get('type')) == 'EncoderTeacher'


def loads_weights(model_cfg: dict) -> bool:
    """Return whether a teacher's backbone loads the weights itself, because a library names its models and weights."""
    return is_encoder(model_cfg) and _library_encoder(model_cfg.get('backbone')) is not None


def encoder_config(source: Union[str, dict]) -> Config:
    """Write the config of a model of a library.

    Args:
        source (str or dict): ``'timm::NAME'``, ``'torchvision::NAME'``, ``'transformers::NAME or folder'``, or the
            config of a backbone, such as ``dict(type='mmdiffkd.TimmEncoder', name=..., out_indices=[5, 11])``.

    Returns:
        Config: ``model``, ``data_preprocessor`` with mean and std of the library for values from 0 to 255, and
        ``image_size``, the width and height on which the model was trained.

    Raises:
        ImportError: If the library is missing or too old.
        FileNotFoundError: If the library has no such model; the message contains the nearest names. Also if the config
            of a model of transformers is neither in the folder nor can be downloaded.
    """
    if not isinstance(source, dict):
        library, _, name = str(source).partition('::')
        source = dict(type=f'mmdiffkd.{LIBRARIES[library].encoder}', name=name)
    cls, name = _library_encoder(source), source.get('name')
    if not isinstance(name, str) or not name:
        raise ConfigError('name', f" is missing: {cls.__name__} needs the name of a model, such as '{cls.example}'.")
    images = cls.image_format(name)
    backbone = dict(source)
    if images.fits_size:
        backbone.setdefault('img_size', images.size[0] if images.size[0] == images.size[1] else images.size)
    preprocessor = dict(bgr_to_rgb=True)
    if images.mean:
        preprocessor.update({key: [255 * value for value in getattr(images, key)] for key in ('mean', 'std')})
    height, width = images.size
    if backbone.get('img_size') is not None:
        size = backbone['img_size']
        height, width = (size, size) if isinstance(size, int) else size
    return Config(
        dict(
            model=dict(type='mmdiffkd.EncoderTeacher', backbone=backbone),
            data_preprocessor=preprocessor,
            image_size=(width, height),
        )
    )


@MODELS.register_module()
class EncoderTeacher(nn.Module):
    """A teacher that is only an image encoder. Its tap ``backbone`` returns feature maps.

    Args:
        backbone (dict): Config of the encoder, any registered module that runs on images, (N, 3, H, W).
    """

    @check_arguments
    def __init__(self, backbone: dict):
        super().__init__()
        self.backbone = build_part(MODELS, backbone, 'backbone')

    def extract_feat(self, images: Tensor):
        """Return the feature maps of images, (N, 3, H, W)."""
        return self.backbone(images)

    def forward(self, images: Tensor):
        """Return the feature maps of images, (N, 3, H, W)."""
        return self.extract_feat(images)


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
    """Return a map as (N, C, H, W) that may be (N, H, W, C); the aspect ratio of the images tells."""
    ratio = image_size[0] / image_size[1]
    errors = [abs(log(feature.size(i) / feature.size(i + 1) / ratio)) for i in (1, 2)]
    return feature.permute(0, 3, 1, 2) if errors[0] < errors[1] else feature


def download_error(name: str, error: Exception, page: str, file: str = 'model.safetensors') -> Exception:
    """Return the error for weights that a library cannot download, to be raised.

    Args:
        name (str): The model in messages, such as ``'timm::resnet18'``.
        error (Exception): The library's error.
        page (str): Address at which the file can be found.
        file (str): Name of the file there. Defaults to ``'model.safetensors'``.
    """
    if is_gated(error):
        return ValueError(
            f"The weights of '{name}' are gated: accept their license on {page} and run 'hf auth login', or download "
            f'{file} there and set teacher.checkpoint to its path.'
        )
    return ValueError(
        f"The weights of '{name}' cannot be downloaded ({one_line(error)}). On a machine with access, download {file} "
        f'from {page} and set teacher.checkpoint to its path.'
    )


def is_gated(error: Optional[BaseException]) -> bool:
    """Return whether an error, or one of its causes, says that weights need an accepted license."""
    while error is not None:
        if type(error).__name__ == 'GatedRepoError' or 'gated repo' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def available_memory() -> Optional[int]:
    """Return the bytes of main memory that are available, also within a container; None if unknown."""
    found = []
    with suppress(OSError, ValueError):  # not Linux
        lines = Path('/proc/meminfo').read_text('utf-8').splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable')]
    with suppress(OSError, ValueError):  # no container, or no limit
        limit, used = (int((CGROUP / f'memory.{name}').read_text('utf-8')) for name in ('max', 'current'))
        lines = (CGROUP / 'memory.stat').read_text('utf-8').splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith('inactive_file '))  # is freed on demand
        found.append(limit - used + cached)
    return min(found, default=None)


def check_memory(name: str, parameters: int, copies: int = 2) -> None:
    """Check that a model fits into memory before its weights are loaded.

    Args:
        name (str): Name of the teacher for the message.
        parameters (int): Number of parameters, of 4 bytes each.
        copies (int): Copies of the weights during loading: those of the file and those of the model. Defaults to 2.

    Raises:
        ValueError: If the estimate is larger than the available memory.
    """
    free, needed = available_memory(), 4 * copies * parameters
    if free is not None and needed > free:
        raise ValueError(
            f'The teacher ({name}) has {parameters / 1e6:,.0f} M parameters, and loading it takes about '
            f'{needed / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free: choose a smaller model.'
        )
