"""Wrapper for image encoders of transformers. :func:`.encoder_config` uses it as the backbone of a teacher."""

import inspect
import json
import os.path as osp
from functools import cache
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from mmdiffkd.engine.checkpoint import read_checkpoint
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import check_arguments, one_line

from ..feature_maps import Tokens, as_map
from .base import ImageFormat, LibraryEncoder, channels_first, choose_levels
from .libraries import PRETRAINED, import_library, is_gated

USUAL_SIZE = 224  # height and width of the images of models whose files do not contain the image size
FILES = 'config.json, preprocessor_config.json and model.safetensors'
# Parts of the names of weights that may be missing in a file: norms that AutoBackbone adds, which start as the
# identity, and modules that no feature depends on.
OPTIONAL = ('hidden_states_norms', 'pooler', 'mask_token')


@MODELS.register_module()
class TransformersEncoder(LibraryEncoder):
    """Image encoder of transformers.

    If ``AutoBackbone`` supports the model, it returns the feature maps. Otherwise, the feature maps are the hidden
    states of ``AutoModel``. If a model is for images and text, such as CLIP, only its image encoder is used.

    The arguments are those of :class:`.LibraryEncoder`. ``name`` is a model on the Hugging Face hub, or a folder that
    ``save_pretrained`` wrote. ``out_indices`` are indices of the stages of ``AutoBackbone``, or of the hidden states of
    ``AutoModel``. The first hidden state is the patch embedding.
    """

    example = 'facebook/dinov2-small'

    @check_arguments
    def __init__(
        self,
        name: str,
        checkpoint: Optional[str] = None,
        out_indices: Optional[Sequence[int]] = None,
        img_size: Union[int, Sequence[int], None] = None,
    ):
        super().__init__()
        self.name = name = osp.expanduser(name)
        self.patch_size = _patch_size(_read_config(name))
        self.out_indices = choose_levels(_strides(name), out_indices)
        self.model = _build(name) if checkpoint is None else self._load(checkpoint)

    @classmethod
    def image_format(cls, name: str) -> ImageFormat:
        """Return the format of the images on which a model was trained; see :meth:`.LibraryEncoder.image_format`."""
        name = osp.expanduser(name)
        config, processor = _read_config(name), _read_processor(name)
        scale = 255 * (processor.get('rescale_factor', 1 / 255) if processor.get('do_rescale', True) else 1)
        mean, std = ([value / scale for value in processor.get(key, ())] for key in ('image_mean', 'image_std'))
        return ImageFormat(mean, std, _image_size(name), _patch_size(config) is not None)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Return the feature maps, (N, C, H', W') each, of images, (N, 3, H, W)."""
        maps = _run(self.model, images)
        return tuple(_as_map(maps[index], images.shape[-2:], self.patch_size) for index in self.out_indices)

    def _load(self, checkpoint: str) -> nn.Module:
        with torch.device('meta'):
            kind = type(_build(self.name))
        name, config = f'transformers::{self.name}', _backbone_config(self.name)
        options = dict(config=config, output_loading_info=True)
        is_file = checkpoint != PRETRAINED
        try:
            if is_file:
                state = dict(read_checkpoint(checkpoint)['state_dict'])
                model, info = kind.from_pretrained(None, state_dict=state, **options)
            else:
                model, info = kind.from_pretrained(self.name, **options)
        except RuntimeError as error:  # weights have wrong shapes
            raise ValueError(f'The weights do not fit the teacher ({name}): {one_line(error)[:400]}') from error
        except OSError as error:
            if is_file:
                raise
            raise _missing(self.name, error) from error
        unfit = [*info['missing_keys'], *(entry[0] for entry in info['mismatched_keys'])]
        unfit = sorted(key for key in unfit if not any(part in key for part in OPTIONAL))
        if unfit:
            rest = f' and {len(unfit) - 4} more' if len(unfit) > 4 else ''
            raise ValueError(
                f'The weights do not fit the teacher ({name}): missing or misshapen {", ".join(unfit[:4])}{rest}.'
            )
        return model.float().eval()


@cache
def _read_config(name: str):
    """Return the config of a model's image encoder."""
    transformers = import_library('transformers')
    is_path = name.startswith(('.', '/')) or osp.isdir(name)
    if is_path and not osp.isfile(osp.join(name, 'config.json')):
        problem = 'has no config.json' if osp.isdir(name) else 'does not exist'
        raise FileNotFoundError(
            f"The folder '{name}' of the teacher {problem}: give a folder that save_pretrained has written, with "
            f'{FILES}.'
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise _missing(name, error) from error
    except ValueError as error:  # the installed version of transformers does not know this kind of model
        raise ValueError(f"'transformers::{name}' cannot be read: {one_line(error)[:300]}") from error
    return getattr(config, 'vision_config', config)


def _missing(name: str, error: Exception) -> Exception:
    """Return an exception that explains why a model's files cannot be read, and what to do.

    Args:
        name (str): Name of the model on the hub, or path of the folder.
        error (Exception): Error of transformers.
    """
    page, text = f'https://huggingface.co/{name}', one_line(error)
    if osp.isdir(name):
        return FileNotFoundError(f"The folder '{name}' of the teacher has no weights: {text[:200]}")
    put = f"put {FILES} of {page} in a folder and set teacher.config='transformers::FOLDER'"
    if is_gated(error):
        return ValueError(
            f"'transformers::{name}' is gated: accept its license on {page}, run 'hf auth login', or {put}."
        )
    if 'not a valid model identifier' in text or 'RepositoryNotFound' in text:
        return FileNotFoundError(
            f"'transformers::{name}' is neither a folder nor a model on the hub. Check the name, or {put}."
        )
    return FileNotFoundError(
        f"'transformers::{name}' cannot be downloaded ({text[:120]}). On a machine with access, {put}."
    )


@cache
def _read_processor(name: str) -> Dict:
    """Return the settings of a model's image processor; empty if the model has no ``preprocessor_config.json``."""
    from transformers.utils import cached_file

    path = cached_file(name, 'preprocessor_config.json', _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text('utf-8')) if path else {}


def _image_size(name: str) -> Tuple[int, int]:
    size = getattr(_read_config(name), 'image_size', None)
    if size is None:
        processor = _read_processor(name)
        size = processor.get('crop_size') or processor.get('size') or USUAL_SIZE
        if isinstance(size, dict):
            size = (size['height'], size['width']) if 'height' in size else next(iter(size.values()))
    return (size, size) if isinstance(size, int) else tuple(size)


def _patch_size(config) -> Optional[int]:
    """Return the patch size of a model without stages, which is the stride of all its maps; None for other models."""
    size = getattr(config, 'patch_size', None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return size if isinstance(size, int) and not hasattr(config, 'depths') else None


def _backbone_config(name: str):
    """Return the config of a model. If ``AutoBackbone`` supports the model, the config makes it return all stages."""
    config = _read_config(name)
    if not _has_backbone(config):
        return config
    stages = dict(out_indices=None, out_features=config.stage_names[1:])
    return type(config).from_dict({**config.to_dict(), **stages})


def _has_backbone(config) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    return type(config) in MODEL_FOR_BACKBONE_MAPPING


def _build(name: str) -> nn.Module:
    """Build a model with random weights."""
    from transformers import AutoBackbone, AutoModel

    config = _backbone_config(name)
    return (AutoBackbone if _has_backbone(config) else AutoModel).from_config(config).eval()


def _run(model: nn.Module, images: Tensor) -> List[Tensor]:
    """Return all feature maps, or the tokens of all hidden states, that a model computes for images."""
    options = {}
    if 'interpolate_pos_encoding' in inspect.signature(model.forward).parameters:
        options = dict(interpolate_pos_encoding=True)
    if hasattr(model, 'out_features'):
        return list(model(images, **options).feature_maps)
    output = model(images, output_hidden_states=True, **options)
    maps = list(output.hidden_states)
    if output.last_hidden_state.shape == maps[-1].shape:  # last_hidden_state is the last map after the final norm
        maps[-1] = output.last_hidden_state
    return maps


def _as_map(feature: Tensor, size: Sequence[int], patch_size: Optional[int]) -> Tensor:
    if feature.dim() == 4:
        return channels_first(feature, size)
    layout = None
    if patch_size is not None:
        layout = Tokens(patch_size, feature.size(1) - (size[0] // patch_size) * (size[1] // patch_size))
    return as_map(feature, size, 'backbone', layout)


@cache
def _strides(name: str) -> Tuple[float, ...]:
    """Return the strides of all maps that :func:`_run` returns for a model."""
    config, size = _read_config(name), _image_size(name)
    patch_size = _patch_size(config)
    if patch_size is not None:
        count = len(config.stage_names) - 1 if _has_backbone(config) else config.num_hidden_layers + 1
        return (patch_size,) * count
    with torch.random.fork_rng(devices=[]), torch.device('meta'), torch.no_grad():
        model = _build(name)
        maps = [_as_map(feature, size, None) for feature in _run(model, torch.zeros(2, 3, *size))]
    return tuple(size[1] / feature.size(-1) for feature in maps)
