"""A dry run tells the widths and strides of taps before anything is trained."""

import copy
from contextlib import nullcontext
from logging import DEBUG
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdiffkd.utils import QuickInit, QuickMeta, build_on_meta, image_channels

from .passes import passes
from .taps import TapError, TapRecorder, Tokens, find_module, flatten

# Device and image size, tried in turn: not every operator knows the meta device, some models take no small images, some
# only those of ImageNet or MNIST. The others are multiples of the largest FPN stride, so that strides come out whole.
ATTEMPTS = (('meta', 512), ('cpu', 128), ('cpu', 512), ('meta', 224), ('cpu', 224), ('cpu', 32))

# some models drop the dimension of a single one
IMAGES = 2


class TapInfo(NamedTuple):
    """What a tap gives.

    Attributes:
        channels (list[int]): Channels of each level; 0 where a level is None.
        strides (list[float or None]): Image pixels per feature pixel of each level; None for vectors.
        calls (int): How often the module is called in a forward pass.
        way (str): The shortest of a model's :func:`passes` that reaches it.
        learns (list[bool], optional): Whether a gradient reaches the model through each level; only the student's
            are looked at.
        tokens (list[Tokens or None], optional): How the tokens of each level are laid out; None where it has none.
        members (int): Number of tensors that a call returns.
    """

    channels: List[int]
    strides: List[Optional[float]]
    calls: int
    way: str = 'features'
    learns: Optional[List[bool]] = None
    tokens: Optional[List[Optional[Tokens]]] = None
    members: int = 1


def probe(model_cfg: dict, paths: Iterable[str], owner: str) -> Dict[str, TapInfo]:
    """Find out what the taps of a model return.

    The model is built and run on the meta device, which costs neither memory nor arithmetic; where an operator does
    not know that device, on the CPU with a small image.

    Args:
        model_cfg (dict): Config of the model.
        paths (iterable[str]): Modules to tap.
        owner (str): ``'student'`` or ``'teacher'``, for error messages.

    Returns:
        dict[str, TapInfo]: One entry a path.

    Raises:
        TapError: If a path does not exist, or is not reached in a forward pass.
        RuntimeError: If the model runs on none of the images tried.
    """
    paths, problems = list(paths), []
    channels = image_channels(model_cfg.get('data_preprocessor'))
    widths = (3, 1) if channels == 1 else (channels,)  # one mean may be meant for three channels
    attempts = [(*attempt, width) for attempt in (*_own_size(model_cfg), *ATTEMPTS) for width in widths]
    for device, size, width in attempts:
        try:
            return _run(model_cfg, paths, owner, device, (width, size, size))
        except TapError:
            raise
        except Exception as error:
            print_log(f'The dry run of the {owner} fails on {device} at {size} pixels: {error}', 'current', DEBUG)
            problems.append(error)
    if len({str(error) for error in problems}) == 1:  # it is not for the size of the image
        raise problems[0]
    raise RuntimeError(
        f'The {owner} {model_cfg["type"]} runs on no empty image, neither at '
        f'{", ".join(sorted({str(size) for _, size in ATTEMPTS}))} pixels nor at an img_size of its backbone; the '
        f'last error was: {problems[-1]}'
    ) from problems[-1]


def check_training_outputs(pair: str, path: str, outputs: List[list], tap: TapInfo) -> None:
    """Check that a tap returns in training what the dry run saw it return in prediction.

    Args:
        pair (str): Name of the pair, for the error message.
        path (str): The tap.
        outputs (list[list[Tensor or None]]): What it returned, an entry a call.
        tap (TapInfo): What the dry run saw.

    Raises:
        TapError: If it was not called, or returned other outputs.
    """
    if len(outputs) < tap.calls:
        raise TapError(
            f"distill.{pair}: the student's '{path}' is not called as a module while it trains; tap a layer inside it, "
            "such as 'decode_head.conv_seg'."
        )
    members = [tensor for call in outputs[: tap.calls] for tensor in call]
    widths = [
        None if tensor is None or tensor.dim() < 2 else tensor.size(2 if tensor.dim() == 3 else 1) for tensor in members
    ]
    fits = all(not wanted or width == wanted for width, wanted in zip(widths, tap.channels))
    if not fits or any(len(call) != tap.members for call in outputs[: tap.calls]):
        raise TapError(
            f"distill.{pair}: the student's '{path}' returns other outputs while it trains ({_widths(widths)} "
            f'channels) than while it predicts ({_widths(tap.channels)}), so it is not clear which to compare; tap a '
            'layer inside it.'
        )


def check_gradient(pair: str, path: str, features: Sequence[Tensor], levels: Sequence[int]) -> None:
    """Check that a tap sends gradient to the student: distilling what does not learn would go unnoticed.

    Args:
        pair (str): Name of the pair, for the error message.
        path (str): The tap.
        features (list[Tensor]): What it returned, one a level.
        levels (list[int]): Those that are distilled.

    Raises:
        TapError: If no gradient reaches the student through one of them.
    """
    lost = [level for level in levels if not features[level].requires_grad]
    if lost and torch.is_grad_enabled():
        others = [level for level in levels if level not in lost]
        cure = f'choose levels={others}' if others else 'tap another module'
        raise TapError(
            f"distill.{pair}: no gradient reaches the student through its tap '{path}', level {lost[0]}. Either it is "
            f'frozen: {cure}. Or it lies inside a part under '
            'reentrant activation checkpointing (with_cp=True, activation_checkpointing=[...]): tap the module around '
            'that part, or switch the checkpointing off there.'
        )


def _widths(channels: Iterable[Optional[int]]) -> str:
    return ', '.join(str(width or 'no') for width in channels)


def _own_size(model_cfg: dict) -> List[Tuple[str, int]]:
    """Attempts at the image size that a backbone is made for, if it names a square one."""
    size = (model_cfg.get('backbone') or {}).get('img_size')
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    return [('meta', size), ('cpu', size)] if isinstance(size, int) else []


def _run(model_cfg: dict, paths: List[str], owner: str, device: str, shape: Tuple[int, int, int]) -> Dict[str, TapInfo]:
    is_meta = device == 'meta'
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.set_grad_enabled(owner == 'student'):
        if is_meta:
            model = build_on_meta(model_cfg)
        else:
            with QuickInit():
                model = MODELS.build(copy.deepcopy(model_cfg))
        model.train().eval()  # some freeze their stages when they are told to train
        for path in paths:
            find_module(model, path, owner)
        images, samples = torch.zeros(IMAGES, *shape), [blank_sample(*shape[1:]) for _ in range(IMAGES)]
        problem, unreached = None, []
        for way, run in passes(model).items():
            try:
                with TapRecorder(model, paths, owner) as taps, QuickMeta() if is_meta else nullcontext():
                    run(images, samples)
            except TapError:
                raise
            except Exception as error:
                problem = error
                continue
            unreached = [path for path, outputs in taps.outputs.items() if not outputs]
            if not unreached:
                return {path: _describe(taps, path, shape[1], way) for path in paths}
    if problem is not None:
        raise problem
    raise TapError(
        f"The {owner} {type(model).__name__} has the module '{unreached[0]}', but a forward pass does not call it; "
        'tap the module around it.'
    )


def _describe(taps: TapRecorder, path: str, size: int, way: str) -> TapInfo:
    tensors = flatten(taps.outputs[path], path)
    features = taps.features(path, (size, size))
    channels, strides, tokens = [], [], []
    for raw, feature in zip(tensors, features):
        channels.append(0 if feature is None else feature.size(1))
        strides.append(None if feature is None or raw.dim() == 2 else size / feature.size(2))
        is_tokens = raw is not None and raw.dim() == 3
        tokens.append(Tokens(strides[-1], raw.size(1) - feature[0, 0].numel()) if is_tokens else None)
        # regions have another number, and so have vectors of them
        if feature is not None and raw.dim() > 2 and feature.size(0) != IMAGES and not path.startswith('roi_head'):
            raise TapError(
                f"The tap '{path}' returns a tensor of shape {tuple(raw.shape)} for {IMAGES} images; its first "
                'dimension must be theirs. Tap a module that returns features of the images.'
            )
    learns = [feature is not None and feature.requires_grad for feature in features]
    calls = taps.outputs[path]
    return TapInfo(
        channels, strides, len(calls), way, learns if torch.is_grad_enabled() else None, tokens, len(calls[0])
    )


def blank_sample(*shape: int) -> BaseDataElement:
    """A data sample of an image of that height and width, without labels."""
    return BaseDataElement(
        metainfo=dict(
            img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0)
        )
    )
