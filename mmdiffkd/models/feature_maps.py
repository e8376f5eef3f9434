"""Convert the outputs of modules, such as nested lists of tensors or tokens, to feature maps."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import product
from math import ceil, floor
from typing import Iterator, List, NamedTuple, Optional, Tuple

from torch import Tensor

# largest number of tokens before the grid: a class token and four register tokens
MAX_EXTRA_TOKENS = 5


class Tokens(NamedTuple):
    """Token layout of a tap.

    Attributes:
        stride (float): Image pixels per token.
        extra (int): Number of tokens before the grid, such as class and register tokens.
    """

    stride: float
    extra: int


class TapError(ValueError):
    """A tap does not exist, is not called in a forward pass, or returns an output that cannot be distilled."""


def as_map(tensor: Tensor, input_size, path: str, tokens: Optional[Tokens] = None) -> Tensor:
    """Convert the output of a tap to a feature map.

    Args:
        tensor (Tensor): A feature map (N, C, H, W), tokens (N, L, C) that may start with class tokens, or vectors
            (N, C).
        input_size (tuple[int, int]): Height and width of the images.
        path (str): The tap, for the error message.
        tokens (Tokens, optional): Token layout. None finds the layout from the number of tokens. Defaults to None.

    Returns:
        Tensor: The feature map, (N, C, H, W). Vectors become maps of 1x1.

    Raises:
        TapError: If the tensor has a different number of dimensions, or its tokens do not form a grid.
    """
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[..., None, None]
    if tensor.dim() != 3:
        raise TapError(
            f"The tap '{path}' returns a tensor of shape {tuple(tensor.shape)}; tap a module that returns feature maps "
            '(N, C, H, W), tokens (N, L, C) or vectors (N, C).'
        )
    grid = _grid(tensor.size(1), input_size, tokens)
    if grid is None:
        images = f'images of {input_size[0]}x{input_size[1]}'
        if tokens is None:
            raise TapError(
                f"The tap '{path}' returns {tensor.size(1)} tokens, which do not form a grid on {images}; tap a module "
                'that returns feature maps.'
            )
        raise TapError(
            f"The tap '{path}' returns {tensor.size(1)} tokens on {images}, which do not form the grid of stride "
            f'{tokens.stride:g} that the tap returns in evaluation mode. If the model drops tokens in training, as in '
            'masked pre-training, distill in its fine-tuning instead.'
        )
    return tensor[:, tensor.size(1) - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def _grid(length: int, input_size, tokens: Optional[Tokens]) -> Optional[Tuple[int, int]]:
    """Return height and width of the grid that the last tokens form; None if the tokens do not form a grid."""
    if tokens is not None:  # models drop incomplete patches at the border (floor) or pad them (ceil)
        sides = [(floor(size / tokens.stride), ceil(size / tokens.stride)) for size in input_size]
        return next((grid for grid in product(*sides) if grid[0] * grid[1] == length - tokens.extra), None)
    ratio = input_size[1] / input_size[0]
    for extra in range(MAX_EXTRA_TOKENS + 1):
        count = length - extra
        if count < 4 * extra:  # too few tokens for a grid with this number of class and register tokens
            return None
        height = round((count / ratio) ** 0.5)
        if not height or count % height or input_size[0] % height:  # not a grid; the tokens may be queries
            continue
        if abs(count / height - height * ratio) < 1:
            return height, count // height
    return None


def flatten(output, path: str) -> List[Optional[Tensor]]:
    """Return the feature tensors in nested tuples, lists, dicts and dataclasses, in order.

    The list also contains the members that are None. All other members, such as sizes, scalars and masks, are left out.

    Args:
        output (Any): Output of a module.
        path (str): The tap, for the error message.

    Raises:
        TapError: If the output contains no feature tensor.
    """
    found = [output] if isinstance(output, Tensor) else list(_members(output))
    if all(tensor is None for tensor in found):
        raise TapError(f"The tap '{path}' returns a {type(output).__name__}; tap a module that returns tensors.")
    return found


def _members(output) -> Iterator[Optional[Tensor]]:
    if isinstance(output, Mapping):
        members = output.values()
    elif isinstance(output, (tuple, list)):
        members = output
    elif is_dataclass(output):
        members = [getattr(output, field.name) for field in fields(output)]
    else:
        return
    for member in members:
        if not isinstance(member, Tensor) and member is not None:
            yield from _members(member)
        elif member is None or (member.dim() > 1 and member.is_floating_point()):
            yield member
