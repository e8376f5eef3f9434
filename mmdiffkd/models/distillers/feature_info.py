"""Dry run of a model: find the channels, strides and gradients of the tapped features."""

import copy
import inspect
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain
from logging import DEBUG, WARNING
from math import lcm
from traceback import walk_tb
from typing import Callable, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdiffkd.utils.config import type_name
from mmdiffkd.utils.image_settings import ENCODERS, WRAPPED, image_channels
from mmdiffkd.utils.meta_device import QuickInit, QuickMeta, build_on_meta

from ..feature_maps import TapError, Tokens, flatten
from .autograd_graph import weights_of
from .batches import blank_sample
from .recorders import ModuleOutputsRecorder, find_module

# Devices and image sizes of the dry run, tried in this order until one works. The CPU is needed because some operators
# do not support the meta device. Some models do not accept small images, or accept only the image size of ImageNet
# (224) or MNIST (32). 128 and 512 are multiples of the largest FPN stride, so the strides are exact.
ATTEMPTS = (('meta', 512), ('cpu', 128), ('cpu', 512), ('meta', 224), ('cpu', 224), ('cpu', 32))

USUAL = (128, 512)  # a model that runs at one of these sizes probably accepts images of any size

# number of images of the dry run: two, because some models drop the batch dimension of a single image
IMAGES = 2


class FeatureInfo(NamedTuple):
    """Description of the features of a tap, similar to timm's ``FeatureInfo``.

    Attributes:
        channels (list[int]): Channels of each level. 0 means that the module returns None for this level.
        strides (list[float or None]): Image pixels per feature pixel of each level; None for vectors.
        calls (int): Number of times that a forward pass calls the module.
        forward_fn (str): Name of the cheapest function of :func:`forward_fns` that calls the module.
        requires_grad (list[bool], optional): Whether each level requires a gradient. None for teachers.
        tokens (list[Tokens or None], optional): Token layout of each level; None for levels without tokens.
        num_outputs (int): Number of outputs of one call of the module, including outputs that are None.
        image_channels (int): Number of channels of the model's input images.
        weights (list[frozenset[str]], optional): Names of the weights that each level depends on. None for teachers, or
            if the names are unknown, because activation checkpointing hides weights from the autograd graph.
    """

    channels: List[int]
    strides: List[Optional[float]]
    calls: int
    forward_fn: str = 'features'
    requires_grad: Optional[List[bool]] = None
    tokens: Optional[List[Optional[Tokens]]] = None
    num_outputs: int = 1
    image_channels: int = 3
    weights: Optional[List[FrozenSet[str]]] = None


def infer_feature_info(model_cfg: dict, paths: Iterable[str], owner: str) -> Dict[str, FeatureInfo]:
    """Run a model on blank images to find the channels, strides and gradients of its taps.

    The model is built and run on the meta device, which needs neither memory nor arithmetic. If this fails, the model
    runs on the CPU with small images.

    Args:
        model_cfg (dict): Config of the model.
        paths (iterable[str]): Paths of the modules to tap.
        owner (str): ``'student'`` or ``'teacher'``. Gradients are only found for a student.

    Returns:
        dict[str, FeatureInfo]: Description of the features, by path.

    Raises:
        TapError: If a module does not exist, or a forward pass does not call the module.
        ValueError: If the model fails at all image sizes that are tried.
    """
    paths, failed = list(paths), {}
    name = type_name(model_cfg['type'])
    widths = image_channels(model_cfg)
    attempts = [(*attempt, width) for attempt in (*_own_size(model_cfg), *ATTEMPTS) for width in widths]
    for device, size, width in chain(attempts, _stem_channels(model_cfg)):
        try:
            infos = _run(model_cfg, paths, owner, device, (width, size, size))
        except _ForwardFailed as error:
            cause = error.__cause__
            # report errors for the most likely number of channels; the other numbers are guesses
            if width == widths[0] or width not in widths or size not in failed:
                failed[size] = cause
            print_log(f'The dry run of the {owner} fails on {device} at {size} pixels: {cause}', 'current', DEBUG)
            continue
        if owner == 'teacher' and size not in USUAL and all(side in failed for side in USUAL):
            print_log(
                f'The teacher {name} runs on images of {size}x{size} pixels, but not on images of '
                f'{" or ".join(f"{side}x{side}" for side in USUAL)} pixels ({failed[USUAL[-1]]}). Train with images '
                'of a size that the teacher accepts.',
                'current',
                WARNING,
            )
        return infos
    problem = failed[attempts[-1][1]]
    advice = f' The {owner} must have extract_feat(images), forward(images), or a module named backbone.'
    if _is_inside(problem):
        advice = ''
    raise ValueError(
        f'The {owner} {name} does not run on blank images of {", ".join(map(str, sorted(failed)))} '
        f'pixels; the last error was {type(problem).__name__}: {problem}.{advice}'
    ) from problem


def _is_inside(error: Exception) -> bool:
    """Return whether a torch layer raised the error. If so, the model was called correctly."""
    frames = [frame.f_globals.get('__name__', '') for frame, _ in walk_tb(error.__traceback__)]
    return any(name.startswith('torch.nn.modules.') and name != 'torch.nn.modules.module' for name in frames)


def _stem_channels(model_cfg: dict) -> Iterator[Tuple[str, int, int]]:
    """Yield attempts with the input channels of the model's first convolution, for configs without this number."""
    known = image_channels(model_cfg)
    with suppress(Exception):
        model = build_on_meta(model_cfg)
        width = next(layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
        if width not in known:
            yield from ((*attempt, width) for attempt in ATTEMPTS)


# divisors that infer_pad_divisor() tries
PAD_DIVISORS = tuple(2**i for i in range(8))


@torch.no_grad()
def infer_pad_divisor(model_cfg: dict, taps: Dict[str, FeatureInfo], declared: int) -> int:
    """Find the number by which height and width of a teacher's images must be divisible, in dry runs.

    Models such as YOLOX and RTMDet concatenate upsampled features, so image sizes must be multiples of their largest
    stride. Some configs of these models do not set this divisor in the preprocessor.

    Args:
        model_cfg (dict): Config of the model.
        taps (dict[str, FeatureInfo]): Taps of the model.
        declared (int): Divisor in the config of the preprocessor.

    Returns:
        int: The divisor, a multiple of ``declared``. If the model does not run on the meta device, ``declared`` itself.
    """
    calls = {path: info.calls for path, info in taps.items()}
    info = next(iter(taps.values()))
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_on_meta(model_cfg)
            model.eval()
    except Exception:
        return declared
    for divisor in dict.fromkeys(lcm(declared, divisor) for divisor in PAD_DIVISORS):
        size = divisor * (256 // divisor | 1)  # an odd multiple, which 2 * divisor does not divide
        images = torch.zeros(IMAGES, info.image_channels, size, size, device='meta')
        samples = [blank_sample(size, size) for _ in range(IMAGES)]
        try:
            with QuickMeta(), ModuleOutputsRecorder(model, calls, 'teacher', stop_after=calls):
                forward_fns(model)[info.forward_fn](images, samples)
            return divisor
        except Exception as error:
            print_log(f'The teacher does not run on images of {size}x{size}: {error}', 'current', DEBUG)
    return declared


def check_training_outputs(pair: str, path: str, outputs: List[list], tap: FeatureInfo) -> None:
    """Check that a tap returns the same number of outputs and channels in training as in the dry run.

    Args:
        pair (str): Name of the pair, for the error message.
        path (str): The tap.
        outputs (list[list[Tensor or None]]): Outputs in training, one list per call.
        tap (FeatureInfo): Description of the tap's features from the dry run.

    Raises:
        TapError: If the tap was called fewer times than in the dry run, or its outputs differ in number or channels.
    """
    if len(outputs) < tap.calls:
        raise TapError(
            f"distill.{pair}: the student's '{path}' is not called as a module in training; tap a layer inside it, "
            "such as 'decode_head.conv_seg'."
        )
    tensors = [tensor for call in outputs[: tap.calls] for tensor in call]
    widths = [
        None if tensor is None or tensor.dim() < 2 else tensor.size(2 if tensor.dim() == 3 else 1) for tensor in tensors
    ]
    fits = all(not wanted or width == wanted for width, wanted in zip(widths, tap.channels))
    if not fits or any(len(call) != tap.num_outputs for call in outputs[: tap.calls]):
        raise TapError(
            f"distill.{pair}: the student's '{path}' returns different outputs in training ({_widths(widths)} "
            f'channels) and in prediction ({_widths(tap.channels)} channels), so the outputs cannot be matched; tap a '
            'layer inside this module.'
        )


def check_gradient(pair: str, path: str, features: Sequence[Tensor], levels: Sequence[int]) -> None:
    """Check that gradients reach the student through a tap; otherwise distillation would have no effect.

    Args:
        pair (str): Name of the pair, for the error message.
        path (str): The tap.
        features (list[Tensor]): Features of the tap, one per level.
        levels (list[int]): Indices of the distilled levels.

    Raises:
        TapError: If a distilled level does not require a gradient.
    """
    lost = [level for level in levels if not features[level].requires_grad]
    if lost and torch.is_grad_enabled():
        others = [level for level in levels if level not in lost]
        cure = f'choose levels={others}' if others else 'tap another module'
        raise TapError(
            f"distill.{pair}: no gradient reaches the student through its tap '{path}', level {lost[0]}. Either the "
            f'level is frozen: {cure}. Or the tap is inside a part with reentrant activation checkpointing '
            '(with_cp=True, activation_checkpointing=[...]): tap the module around this part, or turn off its '
            'checkpointing.'
        )


def _widths(channels: Iterable[Optional[int]]) -> str:
    return ', '.join(str(width or 'no') for width in channels)


def _own_size(model_cfg: dict) -> List[Tuple[str, int]]:
    """Return attempts with the ``img_size`` in the config of the backbone or model.

    The list is empty if ``img_size`` is not set or not square.
    """
    backbone = model_cfg.get('backbone')
    size = next((cfg['img_size'] for cfg in (backbone, model_cfg) if isinstance(cfg, dict) and 'img_size' in cfg), None)
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    return [('meta', size), ('cpu', size)] if isinstance(size, int) else []


class _ForwardFailed(Exception):
    """A forward pass of the dry run failed. ``__cause__`` is the error of the model."""


def _run(
    model_cfg: dict, paths: List[str], owner: str, device: str, shape: Tuple[int, int, int]
) -> Dict[str, FeatureInfo]:
    is_meta = device == 'meta'
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.set_grad_enabled(owner == 'student'):
        if is_meta:
            model = build_on_meta(model_cfg)
        else:
            with QuickInit():
                model = MODELS.build(copy.deepcopy(model_cfg))
        model.train()  # some models freeze their stages in train()
        model.eval()
        for path in paths:
            find_module(model, path, owner)
        images, samples = torch.zeros(IMAGES, *shape), [blank_sample(*shape[1:]) for _ in range(IMAGES)]
        problem, unreached = None, []
        names = {id(weight): name for name, weight in model.named_parameters()} if owner == 'student' else {}
        for forward_fn, run in forward_fns(model).items():
            try:
                with ModuleOutputsRecorder(model, paths, owner) as taps, QuickMeta() if is_meta else nullcontext():
                    run(images, samples)
            except TapError:
                raise
            except Exception as error:
                problem = error
                continue
            unreached = [path for path, outputs in taps.outputs.items() if not outputs]
            if not unreached:
                return {
                    path: _describe(taps, path, shape[1], forward_fn, names)._replace(image_channels=shape[0])
                    for path in paths
                }
    if problem is not None:
        raise _ForwardFailed from problem
    raise TapError(
        f"The {owner} {type(model).__name__} has the module '{unreached[0]}', but a forward pass does not call it; "
        'tap the module around it.'
    )


def _describe(taps: ModuleOutputsRecorder, path: str, size: int, forward_fn: str, names: Dict[int, str]) -> FeatureInfo:
    tensors = flatten(taps.outputs[path], path)
    features = taps.features(path, (size, size))
    channels, strides, tokens = [], [], []
    for raw, feature in zip(tensors, features):
        channels.append(0 if feature is None else feature.size(1))
        strides.append(None if feature is None or raw.dim() == 2 else size / feature.size(2))
        is_tokens = raw is not None and raw.dim() == 3
        tokens.append(Tokens(strides[-1], raw.size(1) - feature[0, 0].numel()) if is_tokens else None)
        # do not check RoI features and vectors: their first dimension may be the number of regions
        if feature is not None and raw.dim() > 2 and feature.size(0) != IMAGES and not path.startswith('roi_head'):
            raise TapError(
                f"The tap '{path}' returns a tensor of shape {tuple(raw.shape)} for {IMAGES} images, but the first "
                'dimension must be the number of images. Tap a module that returns features of each image.'
            )
    requires_grad = [feature is not None and feature.requires_grad for feature in features]
    weights = [frozenset() if feature is None else weights_of(feature, names) for feature in features]
    calls = taps.outputs[path]
    return FeatureInfo(
        channels,
        strides,
        len(calls),
        forward_fn,
        requires_grad if torch.is_grad_enabled() else None,
        tokens,
        len(calls[0]),
        weights=weights if names and None not in weights else None,
    )


def encoder_path(model: nn.Module) -> Optional[str]:
    """Return the path of the image encoder, which has a name in ``ENCODERS``; None if there is no such module."""
    modules = dict(model.named_modules())
    paths = [prefix + name for prefix in ('', *(f'{part}.' for part in WRAPPED)) for name in ENCODERS]
    return next((path for path in paths if path in modules), None)


def forward_fns(model: nn.Module) -> Dict[str, Callable[[Tensor, Optional[list]], object]]:
    """Return functions that run a whole model or only parts of it, by name, starting with the cheapest function.

    Most taps are in the backbone or neck. To reach these taps, the heads need not run.

    Args:
        model (nn.Module): The model.

    Returns:
        dict[str, callable]: Functions of images, (N, C, H, W), and a list of data samples or None.
    """
    functions = {}
    for name, part in [('features', model)] + [(f'{name} features', getattr(model, name, None)) for name in WRAPPED]:
        if hasattr(part, 'extract_feat'):
            functions[name] = lambda images, samples, part=part: part.extract_feat(images)
    encoder = encoder_path(model)
    if encoder is not None:
        functions['encoder'] = lambda images, samples: model.get_submodule(encoder)(images)
    if hasattr(model, 'decode_head'):
        functions['heads'] = lambda images, samples: _run_segmentation_heads(model, images)
    functions['whole'] = partial(_run_whole, model)
    return functions


def _run_whole(model: nn.Module, images: Tensor, samples: Optional[list]):
    """Call a whole model. Models of OpenMMLab's packages get images and data samples, other modules only images."""
    signature = inspect.signature(model.forward)
    if isinstance(model, BaseModel):
        for args in ((images, samples), (images,)):
            with suppress(TypeError):
                signature.bind(*args, mode='tensor')
                break
        else:
            return model(images)
        return model(*args, mode='tensor')
    first = next(iter(signature.parameters.values()), None)
    is_keyword = first is not None and first.kind is first.KEYWORD_ONLY
    return model(**{first.name: images}) if is_keyword else model(images)


def _run_segmentation_heads(model: nn.Module, images: Tensor) -> None:
    """Run the decode head and the auxiliary heads, because a segmentor runs its auxiliary heads only in training."""
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


def run_box_branch(model: nn.Module, inputs: Tensor, rois: Tensor) -> None:
    """Run a detector's box branch on the given RoIs, (R, 5), of images, (N, 3, H, W)."""
    model.roi_head._bbox_forward(model.extract_feat(inputs), rois)
