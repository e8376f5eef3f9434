"""Teachers that consist only of an image encoder, and configs for encoders of timm, torchvision and transformers."""

from typing import Optional, Union

from mmengine.config import Config
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, build_part, check_arguments, get_class
from mmdiffkd.utils.config import type_name

from .base import LibraryEncoder
from .libraries import LIBRARIES


@MODELS.register_module()
class EncoderTeacher(nn.Module):
    """A teacher that consists only of an image encoder. Tap its module ``backbone`` for the feature maps.

    Args:
        backbone (dict): Config of the encoder. Any registered module that runs on images, (N, 3, H, W), can be used.
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


def is_library_source(source: Union[str, dict]) -> bool:
    """Return whether the config of a teacher is a model of timm, torchvision or transformers.

    Args:
        source (str or dict): A name, such as ``'timm::resnet50'``, or the config of one of the wrappers, such as
            ``dict(type='mmdiffkd.TimmEncoder', name='resnet50')``.
    """
    if isinstance(source, dict):
        return 'model' not in source and _library_encoder(source) is not None
    return str(source).partition('::')[0] in LIBRARIES and '::' in str(source)


def _library_encoder(cfg) -> Optional[type]:
    """Return the class in the config of a backbone if it is a :class:`LibraryEncoder`; None otherwise."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    if isinstance(kind, str) and type_name(kind) in {library.encoder for library in LIBRARIES.values()}:
        kind = get_class(MODELS, f'mmdiffkd.{type_name(kind)}')
    return kind if isinstance(kind, type) and issubclass(kind, LibraryEncoder) else None


def is_encoder(model_cfg: dict) -> bool:
    """Return whether the config of a model builds an :class:`EncoderTeacher`."""
    return type_name(model_cfg.get('type')) == 'EncoderTeacher'


def is_library_model(model_cfg: dict) -> bool:
    """Return whether a teacher is an :class:`EncoderTeacher` whose backbone is a model of a library.

    Such a backbone loads its weights itself.
    """
    return is_encoder(model_cfg) and _library_encoder(model_cfg.get('backbone')) is not None


def encoder_config(source: Union[str, dict]) -> Config:
    """Create the config of a teacher from a model of timm, torchvision or transformers.

    Args:
        source (str or dict): ``'timm::NAME'``, ``'torchvision::NAME'``, ``'transformers::NAME'``,
            ``'transformers::FOLDER'``, or the config of a backbone, such as
            ``dict(type='mmdiffkd.TimmEncoder', name=..., out_indices=[5, 11])``.

    Returns:
        Config: A config with three keys. ``model`` is the model. ``data_preprocessor`` has the library's mean and std,
        scaled to values from 0 to 255. ``image_size`` is the width and height of the images on which the model was
        trained, or of the ``img_size`` that ``source`` sets.

    Raises:
        ImportError: If the library is missing or too old.
        FileNotFoundError: If the library has no model with this name; the message lists the nearest names. Also if the
            config of a transformers model is not in the folder or cannot be downloaded.
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
