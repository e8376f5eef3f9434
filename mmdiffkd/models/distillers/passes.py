"""How to run a model no further than its taps, and what its image encoder sees while it trains."""

from contextlib import AbstractContextManager
from typing import Callable, Dict, List, Optional

from torch import Tensor, nn

from .taps import find_module

# where upstream's models keep what sees the image first
ENCODERS = ('backbone', 'image_encoder', 'vision_backbone', 'vision_encoder', 'visual_encoder')
# trackers and semi-supervised models keep a whole detector there
WRAPPED = ('detector', 'student')


def encoder_path(model: nn.Module) -> Optional[str]:
    """Path of the module that sees a model's images first, None if it is not where upstream keeps it."""
    modules = dict(model.named_modules())
    paths = [prefix + name for prefix in ('', *(f'{part}.' for part in WRAPPED)) for name in ENCODERS]
    return next((path for path in paths if path in modules), None)


def passes(model: nn.Module) -> Dict[str, Callable[[Tensor, Optional[list]], object]]:
    """Ways to run a model on images (N, 3, H, W) and their samples, by name; the shortest first.

    Most taps lie in backbone and neck, which run where proposals and post-processing do not.
    """
    ways = {}
    for name, part in [('features', model)] + [(f'{name} features', getattr(model, name, None)) for name in WRAPPED]:
        if hasattr(part, 'extract_feat'):
            ways[name] = lambda images, samples, part=part: part.extract_feat(images)
    encoder = encoder_path(model)
    if encoder is not None:
        ways['encoder'] = lambda images, samples: model.get_submodule(encoder)(images)
    if hasattr(model, 'decode_head'):
        ways['heads'] = lambda images, samples: _run_segmentation_heads(model, images)
    ways['whole'] = lambda images, samples: model(images, samples, mode='tensor')
    return ways


def _run_segmentation_heads(model: nn.Module, images: Tensor) -> None:
    """Decode head and auxiliary heads; a segmentor runs the latter only to compute its losses."""
    features = model.extract_feat(images)
    if isinstance(model.decode_head, nn.ModuleList):
        output = model.decode_head[0](features)
        for stage in model.decode_head[1:]:
            output = stage(features, output)
    else:
        model.decode_head(features)
    auxiliary = getattr(model, 'auxiliary_head', None)
    for head in auxiliary if isinstance(auxiliary, nn.ModuleList) else filter(None, [auxiliary]):
        head(features)


class ImageRecorder(AbstractContextManager):
    """Record the images that the encoder of a model is first called with in a ``with`` block.

    Self-supervised models and trackers take views or clips and decide themselves which of them they encode.

    Attributes:
        images (list[Tensor]): The images of the first call, (N, 3, H, W); empty before it.
    """

    def __init__(self, model: nn.Module, path: str):
        self.images: List[Tensor] = []
        self._module = find_module(model, path, 'student')

    def __enter__(self):
        self._handle = self._module.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def _record(self, module, args, kwargs):
        if not self.images:
            self.images.append(args[0] if args else next(iter(kwargs.values())))

    def __exit__(self, *error):
        self._handle.remove()
