"""Wrapper for image encoders of timm. :func:`.encoder_config` uses it as the backbone of a teacher."""

from functools import cache
from logging import ERROR, getLogger
from typing import Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from mmdiffkd.engine.checkpoint import read_checkpoint
from mmdiffkd.engine.weights import fit_weights, own_shapes
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import check_arguments, closest_names, one_line

from .base import ImageFormat, LibraryEncoder, choose_levels
from .libraries import PRETRAINED, download_error, import_library

# Arguments that let a model with position embeddings or windows accept images of any size. Each is tried in this order,
# because most models have only one of them; {} is for models with neither.
ANY_SIZE = (dict(dynamic_img_size=True), dict(strict_img_size=False), {})


@MODELS.register_module()
class TimmEncoder(LibraryEncoder):
    """Image encoder of timm. Its method ``forward_intermediates`` returns the feature maps.

    The arguments are those of :class:`.LibraryEncoder`. ``out_indices`` are indices in the model's ``feature_info``,
    which lists the stages of a model with stages, or the blocks of a ViT. The final norm of a ViT is applied to all of
    its maps.
    """

    example = 'convnextv2_tiny'

    @check_arguments
    def __init__(
        self,
        name: str,
        checkpoint: Optional[str] = None,
        out_indices: Optional[Sequence[int]] = None,
        img_size: Union[int, Sequence[int], None] = None,
    ):
        super().__init__()
        self.name = name
        options = dict(_size_options(name))
        if img_size is not None and _pretrained_cfg(name).fixed_input_size:
            if img_size != _pretrained_cfg(name).input_size[-1]:
                options['img_size'] = img_size
        self.model = self._load(checkpoint, options)
        strides = [entry['reduction'] for entry in _feature_entries(self.model)]
        levels = choose_levels(strides, out_indices)
        self.norm = len(set(strides)) == 1 and len(strides) > 1
        self.out_indices = list(self.model.prune_intermediate_layers(levels, prune_norm=not self.norm))

    @classmethod
    def image_format(cls, name: str) -> ImageFormat:
        """Return the format of the images on which a model was trained; see :meth:`.LibraryEncoder.image_format`."""
        cfg = _pretrained_cfg(name)
        from timm.data import resolve_data_config

        images = resolve_data_config(pretrained_cfg=cfg.to_dict())
        return ImageFormat(images['mean'], images['std'], tuple(images['input_size'][-2:]), bool(cfg.fixed_input_size))

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Return the feature maps, (N, C, H', W') each, of images, (N, 3, H, W)."""
        return tuple(
            self.model.forward_intermediates(
                images,
                indices=self.out_indices,
                norm=self.norm,
                stop_early=not self.norm,
                output_fmt='NCHW',
                intermediates_only=True,
            )
        )

    def _load(self, checkpoint: Optional[str], options: Dict):
        timm = import_library('timm')
        if checkpoint is None:
            return timm.create_model(self.name, **options)
        cfg = _pretrained_cfg(self.name)
        if checkpoint == PRETRAINED:
            if not cfg.has_weights:
                listed = timm.list_pretrained()
                raise ValueError(
                    f"timm lists no weights for '{self.name}'; the nearest models with weights are "
                    f'{closest_names(self.name, listed)}. Use one of these, or set teacher.checkpoint to a file.'
                )
            try:
                return timm.create_model(self.name, pretrained=True, **options)
            except RuntimeError as error:  # the weights do not fit the model
                raise ValueError(f"The weights of 'timm::{self.name}' cannot be loaded: {one_line(error)}") from error
            except Exception as error:
                page = f'https://huggingface.co/{cfg.hf_hub_id}' if cfg.hf_hub_id else cfg.url
                file = 'model.safetensors' if cfg.hf_hub_id else cfg.url.rpartition('/')[2]
                raise download_error(f'timm::{self.name}', error, page, file) from error
        state = read_checkpoint(checkpoint)['state_dict']
        with torch.device('meta'):
            own = timm.create_model(self.name, **options)
        state = dict(fit_weights(state, own_shapes(own), is_teacher=True).weights)
        state.update(_classifier(own, cfg))
        try:
            return timm.create_model(
                self.name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, source=''), **options
            )
        except (RuntimeError, KeyError, AttributeError) as error:
            problem = ' '.join(str(error).split())  # one line: torch puts missing and unexpected keys on separate lines
            raise ValueError(
                f"The weights of '{checkpoint}' do not fit the teacher (timm::{self.name}): {problem[:400]}"
            ) from error


def _classifier(model, cfg) -> Dict[str, Tensor]:
    """Return zeros for the weights of the classifier, so that checkpoints without a classifier can be loaded.

    The teacher does not use the classifier.
    """
    names = cfg.classifier or ()
    names = (names,) if isinstance(names, str) else names
    return {
        key: torch.zeros(value.shape)
        for key, value in model.state_dict().items()
        if any(key.startswith(f'{name}.') for name in names)
    }


def _feature_entries(model) -> Sequence[Dict]:
    info = model.feature_info
    return list(info) if isinstance(info, (list, tuple)) else info.info


@cache
def _pretrained_cfg(name: str):
    """Return timm's ``PretrainedCfg`` of a model, which describes its weights and images."""
    timm = import_library('timm')
    architecture, _, tag = name.partition('.')
    known = timm.list_models()
    if architecture not in known:
        raise FileNotFoundError(f"timm has no model '{name}'; the nearest are {closest_names(architecture, known)}.")
    tags = timm.list_pretrained(f'{architecture}.*')
    if tag and name not in tags:
        raise FileNotFoundError(f"timm has no weights '{name}'; the nearest are {closest_names(name, tags) or 'none'}.")
    return timm.get_pretrained_cfg(name)


@cache
def _size_options(name: str) -> Tuple[Tuple[str, bool], ...]:
    """Return the arguments with which a model accepts images of any size; empty if it needs no such arguments."""
    timm = import_library('timm')
    if not _pretrained_cfg(name).fixed_input_size:
        return ()
    logger = getLogger('timm')
    level = logger.level
    logger.setLevel(ERROR)
    try:
        for options in ANY_SIZE:
            try:
                with torch.random.fork_rng(devices=[]), torch.device('meta'):
                    timm.create_model(name, **options)
                return tuple(options.items())
            except TypeError:  # the model has no such argument
                continue
    finally:
        logger.setLevel(level)
    return ()
