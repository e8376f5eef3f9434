"""Search the autograd graph for the weights that a tensor depends on, and for the images that its rows belong to."""

from collections.abc import Mapping
from typing import Dict, FrozenSet, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn


def weights_of(tensor: Tensor, names: Dict[int, str]) -> Optional[FrozenSet[str]]:
    """Return the names of the weights that a tensor depends on.

    Args:
        tensor (Tensor): A tensor with an autograd graph.
        names (dict[int, str]): Names of the model's weights, by ``id`` of the weight.

    Returns:
        frozenset[str], optional: The names. None if they are unknown, because reentrant activation checkpointing hides
        weights from the graph.
    """
    nodes = [node for node, _ in _graph([tensor])]
    if any('CheckpointFunction' in node.name() for node in nodes):
        return None
    return frozenset(names[key] for key in (id(getattr(node, 'variable', None)) for node in nodes) if key in names)


def trains(losses, module: nn.Module) -> bool:
    """Return whether the losses depend on any weight of a module."""
    weights = {id(weight) for weight in module.parameters()}
    return any(id(getattr(node, 'variable', None)) in weights for node, _ in _graph(_tensors(losses)))


def find_rows(feature: Tensor, batch_size: int) -> Optional[Tensor]:
    """Find the image that each row of a feature belongs to, for heads that run on only some images of the batch.

    The autograd graph has recorded how the model selected these images: by a mask, indices, a slice or a split, or by
    stacking single images.

    Args:
        feature (Tensor): A feature that requires a gradient, (M, ...), with one row per selected image.
        batch_size (int): Number of images in the batch, N.

    Returns:
        Tensor, optional: Indices of the M selected images, on the CPU. None if the graph contains no such selection.
    """
    return _find_rows((feature.grad_fn, 0), len(feature), batch_size)


Edge = Tuple[Optional[torch.autograd.graph.Node], int]


def _find_rows(edge: Edge, count: int, batch_size: int) -> Optional[Tensor]:
    for node, output in walk_graph([edge]):
        selection = _selection(node, output)
        if selection is None or len(selection[0]) != count:
            continue
        rows, size, source = selection
        if size == batch_size:
            return rows
        # the input is itself a selection from the batch: combine both selections
        before = _find_rows(source, size, batch_size) if size != count else None
        if before is not None:
            return before[rows]
    return None


def _selection(node, output: int) -> Optional[Tuple[Tensor, int, Edge]]:
    """Return which rows an operator selects from its input; None for operators that do not select rows.

    Args:
        node (Node): Node of the operator in the autograd graph.
        output (int): Index of the operator's output.

    Returns:
        tuple[Tensor, int, Edge], optional: Indices of the selected rows, the input's number of rows, and the edge to
        the input.
    """
    kind, sources = node.name().rstrip('0123456789'), node.next_functions
    if kind in ('StackBackward', 'CatBackward') and node._saved_dim == 0:
        parts = [source[0] and _selection(*source) for source in sources]
        if not parts or None in parts or len({size for _, size, _ in parts}) > 1:
            return None
        return torch.cat([rows for rows, *_ in parts]), *parts[0][1:]
    is_unbind = kind == 'UnbindBackward'
    size = len(node._input_metadata) if is_unbind else next(iter(getattr(node, '_saved_self_sym_sizes', ())), None)
    if size is None or (kind != 'IndexBackward' and getattr(node, '_saved_dim', None) != 0):
        return None
    rows, everything = None, torch.arange(size)
    if kind == 'IndexBackward':
        index = node._saved_indices[0]
        rows = None if index is None or index.dim() != 1 else everything[index.cpu()]
    elif kind == 'IndexSelectBackward':
        rows = everything[node._saved_index.cpu()]
    elif kind == 'SelectBackward':
        rows = everything[[_signed(node._saved_index)]]
    elif is_unbind:
        rows = everything[[output]]
    elif kind == 'SliceBackward':
        rows = everything[_signed(node._saved_start) : _signed(node._saved_end) : node._saved_step]
    elif kind == 'SplitBackward':
        rows = everything.split(node._saved_split_size)[output]
    elif kind == 'SplitWithSizesBackward':
        rows = everything.split(node._saved_split_sizes)[output]
    return None if rows is None else (rows, size, sources[0])


def _signed(value: int) -> int:
    """Restore the sign of an index. The autograd graph stores negative indices as unsigned 64-bit integers."""
    return value - 2**64 if value >= 2**63 else value


def _tensors(values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (Mapping, list, tuple)):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


def _graph(tensors: Iterable[Tensor]) -> Iterator[Edge]:
    return walk_graph([(tensor.grad_fn, 0) for tensor in tensors])


def walk_graph(edges: List[Edge]) -> Iterator[Edge]:
    """Yield all edges that can be reached from the given edges of an autograd graph, in breadth-first order."""
    seen = set()
    while edges:
        following = []
        for edge in edges:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                yield edge
                following += edge[0].next_functions
        edges = following
