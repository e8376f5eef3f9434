"""Wrapper for image encoders of torchvision. :func:`.encoder_config` uses it as the backbone of a teacher."""

from functools import cache
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from mmdiffkd.engine.checkpoint import read_checkpoint
from mmdiffkd.engine.weights import fit_weights, load_strict, own_shapes
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, check_arguments, closest_names
from mmdiffkd.utils.meta_device import QuickInit

from ..feature_maps import as_map
from .base import ImageFormat, LibraryEncoder, channels_first, choose_levels
from .libraries import PRETRAINED, download_error, import_library

# Height and width of the images that show which maps a model has, for models that accept any size. The images are not
# square, so that the shape of a map shows whether it is (N, C, H, W) or (N, H, W, C).
TRIAL_SIZE = (256, 384)
MAX_STRIDE = 64  # outputs with this stride or a larger one are regarded as pooled and not used
VIT_BLOCK = 'encoder_layer_'  # start of the names of a ViT's blocks
HEADS = ('avgpool', 'classifier', 'fc', 'head')  # start of the names of modules that follow the encoder


@MODELS.register_module()
class TorchvisionEncoder(LibraryEncoder):
    """Classifier of torchvision without its head. ``create_feature_extractor`` extracts the feature maps.

    The arguments are those of :class:`.LibraryEncoder`. ``out_indices`` are indices in the list of the
    model's maps. The list has the last map of each stride, the smallest stride first. For a ViT, it has the map of each
    block.
    """

    example = 'resnet50'

    @check_arguments
    def __init__(
        self,
        name: str,
        checkpoint: Optional[str] = None,
        out_indices: Optional[Sequence[int]] = None,
        img_size: Union[int, Sequence[int], None] = None,
    ):
        super().__init__()
        torchvision = import_library('torchvision')
        from torchvision.models.feature_extraction import create_feature_extractor

        self.name = name
        options = _size_options(name, img_size)
        stages = _stages(name, tuple(options.items()))
        chosen = [stages[index] for index in choose_levels([stage.stride for stage in stages], out_indices)]
        self.nodes = [stage.node for stage in chosen]
        self.channels_last = [stage.channels_last for stage in chosen]
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        shapes = own_shapes(model)
        self.model = create_feature_extractor(
            model, {node: str(index) for index, node in enumerate(self.nodes)}, suppress_diff_warning=True
        )
        if checkpoint is not None:
            self._load(checkpoint, shapes)

    @classmethod
    def image_format(cls, name: str) -> ImageFormat:
        """Return the format of the images on which a model was trained; see :meth:`.LibraryEncoder.image_format`."""
        images = _weights(name).transforms()
        return ImageFormat(images.mean, images.std, (images.crop_size[0],) * 2, bool(_size_options(name, 1)))

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Return the feature maps, (N, C, H', W') each, of images, (N, 3, H, W)."""
        maps = [
            level if level.dim() == 4 else as_map(level, images.shape[-2:], '') for level in self.model(images).values()
        ]
        return tuple(level.permute(0, 3, 1, 2) if last else level for level, last in zip(maps, self.channels_last))

    def _load(self, checkpoint: str, shapes: Dict[str, torch.Size]) -> None:
        source = _weights(self.name).url if checkpoint == PRETRAINED else checkpoint
        try:
            state = read_checkpoint(source)['state_dict']
        except ValueError as error:
            if checkpoint != PRETRAINED or 'could not be downloaded' not in str(error):
                raise
            page, _, file = source.rpartition('/')
            raise download_error(f'torchvision::{self.name}', error.__cause__ or error, page, file) from error
        own = own_shapes(self.model)
        # modules that the feature extractor has dropped, such as the classifier
        unused = {key.split('.')[0] for key in shapes} - {key.split('.')[0] for key in own}
        weights = {
            key: value
            for key, value in fit_weights(state, shapes, is_teacher=True).weights.items()
            if key in own or (key not in shapes and key.split('.')[0] not in unused)
        }
        load_strict(self.model, weights, f'the teacher (torchvision::{self.name})', f"'{source}'")


@cache
def _weights(name: str):
    """Return torchvision's default weights of a model."""
    models = import_library('torchvision').models
    known = models.list_models(module=models)
    if name not in known:
        if name in models.list_models():
            raise FileNotFoundError(
                f"'torchvision::{name}' is not an image encoder: use a classifier, such as 'torchvision::resnet50'."
            )
        raise FileNotFoundError(f"torchvision has no model '{name}'; the nearest are {closest_names(name, known)}.")
    return models.get_model_weights(name).DEFAULT


def _size_options(name: str, img_size) -> Dict:
    """Return the arguments that set the image size of a model; empty for models that accept images of any size."""
    if img_size is None or not name.startswith(('vit_', 'maxvit_')):
        return {}
    if not isinstance(img_size, int):
        if len(set(img_size)) > 1:
            raise ConfigError('img_size', f'={list(img_size)}: {name} takes square images only.')
        img_size = img_size[0]
    return dict(input_size=(img_size, img_size)) if name.startswith('maxvit') else dict(image_size=img_size)


class Stage(NamedTuple):
    """A feature map that a model can return.

    Attributes:
        node (str): Name of the map's node in the graph of ``create_feature_extractor``.
        stride (float): Image pixels per feature pixel.
        channels_last (bool): Whether the map is (N, H, W, C) instead of (N, C, H, W).
    """

    node: str
    stride: float
    channels_last: bool = False


@cache
def _stages(name: str, options: Tuple) -> List[Stage]:
    """Return the last map of each stride of a model, or the map of each block of a ViT.

    Args:
        name (str): Name of the model.
        options (tuple): Items of :func:`_size_options`.
    """
    models = import_library('torchvision').models
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        try:
            model = models.get_model(name, weights=None, **dict(options)).eval()
        except Exception:  # some models, such as RegNet, read tensor values in their constructor: build them on the CPU
            with torch.device('cpu'), QuickInit():
                model = models.get_model(name, weights=None, **dict(options)).eval().to('meta')
        size = TRIAL_SIZE
        if _size_options(name, 1):
            height = next((value for _, value in options), _weights(name).transforms().crop_size)
            height = height if isinstance(height, int) else height[0]
            size = height, height
        found: Dict[str, Stage] = {}

        def note(path):
            def hook(module, inputs, output):
                stage = _as_stage(path, output, size)
                if stage is not None:
                    found.pop(path, None)
                    found[path] = stage

            return hook

        for path, module in model.named_modules():
            is_stage = path and path.count('.') < 2 and not path.startswith(HEADS)
            if is_stage or path.rpartition('.')[2].startswith(VIT_BLOCK):
                module.register_forward_hook(note(path))
        with torch.no_grad():
            model(torch.zeros(2, 3, *size))
    blocks = [stage for path, stage in found.items() if path.rpartition('.')[2].startswith(VIT_BLOCK)]
    if blocks:  # the map of the last block is taken after the final norm
        return [*blocks[:-1], blocks[-1]._replace(node='encoder.ln')]
    last = {round(stage.stride): stage for stage in found.values()}
    return sorted(last.values(), key=lambda stage: stage.stride)


def _as_stage(node: str, output, size: Tuple[int, int]) -> Optional[Stage]:
    """Describe an output that is a feature map, or tokens after a class token.

    Args:
        node (str): Path of the module.
        output (Any): Output of the module.
        size (tuple[int, int]): Height and width of the images.

    Returns:
        Stage, optional: None if the output is neither a map nor tokens, or if it is a pooled map.
    """
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        return None
    if output.dim() == 3:
        side = (output.size(1) - 1) ** 0.5
        return Stage(node, size[0] / side) if side > 1 and side == int(side) else None
    first = channels_first(output, size)
    side = first.size(-2)
    if not (side * MAX_STRIDE > size[0] and side < size[0]):
        return None
    return Stage(node, size[0] / side, channels_last=first is not output)
