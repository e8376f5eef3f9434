"""Fit the weights of a checkpoint to a model: remove prefixes and entries that are not weights, and load strictly."""

import re
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from functools import partial
from logging import WARNING
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from .checkpoint import PREFIX, STATE, check_and_read, find_state_dict, with_state_dict, without_diffusion_module
from .distributed import on_all_ranks

# Names that wrappers such as DDP, torch.compile and FSDP insert before the names of a module's weights.
WRAPPER = re.compile(r'(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# Entries that a model computes itself or does not need: counters of batches, of averaging and of thop; index and mask
# buffers that some versions of a model save; statistics of preprocessors; buffers of losses.
NO_WEIGHT = re.compile(
    r'(?<![^.])(?:num_batches_tracked|n_averaged|steps|total_ops|total_params|position_ids|relative_position_index'
    r'|rel_pos_index|attn_mask|_extra_state|(?:data_preprocessor\.|pixel_)(?:mean|std)'
    r'|(?:loss|criterion)\w*\.[\w.]+)$'
)
COPY = re.compile(r'ema|averag|momentum|shadow|encoder_k')  # in the name of an averaged copy of a model
TEACHER = re.compile(r'teacher|target')


class Fit(NamedTuple):
    """Weights of a checkpoint, renamed to match a model.

    Attributes:
        weights (OrderedDict): The weights. Entries that the model does not have are kept, except for entries that are
            known not to be weights, such as counters.
        notes (list[str]): Changes of the names and entries for the log, one clause each.
    """

    weights: OrderedDict
    notes: List[str]


def fit_weights(state_dict: dict, shapes: Dict[str, torch.Size], is_teacher: bool = False) -> Fit:
    """Rename the entries of a state dict to match the parameters and buffers of a model.

    The function removes wrapper prefixes such as ``module.``, copies of the weights that averaging hooks save, and
    entries that are not weights. It removes a prefix that all keys share, and adds a prefix that all keys lack. If the
    file holds several models, the function selects the one that fits.

    Args:
        state_dict (dict): Weights of a checkpoint.
        shapes (dict[str, torch.Size]): Names and shapes of the model's parameters and buffers.
        is_teacher (bool): Whether the model is a teacher. If several models in the file fit, their names show which one
            is a teacher. Defaults to False.

    Returns:
        Fit: The renamed weights, and notes for the log.

    Raises:
        ValueError: If several models in the file fit equally well.
    """
    state = without_diffusion_module(state_dict)
    # modules read the versions in _metadata to convert the keys of old checkpoints
    metadata = getattr(state_dict, '_metadata', None)
    notes: List[str] = []
    if not all(key in shapes for key in state):
        state = _without_copies(state, notes)
        if _matches(without_wrappers(state), shapes, '') > _matches(state, shapes, ''):
            state = without_wrappers(state)
        else:
            prefixes = Counter(prefix for key in state for prefix in _prefixes(key, shapes))
            unwrapped = without_wrappers(state)
            inner = Counter(prefix for key in unwrapped for prefix in _prefixes(key, shapes))
            if max(inner.values(), default=0) > max(prefixes.values(), default=0):
                state, prefixes = unwrapped, inner
            prefix = _choose_prefix(state, shapes, prefixes, is_teacher)
            if prefix:
                state, metadata = _under(prefix, state, notes), _under(prefix, metadata or {}, [])
            elif not prefixes and (missing := _missing_prefix(state, shapes, whole=True)):
                state = OrderedDict((missing + key, value) for key, value in state.items())
                metadata = OrderedDict((missing + key, value) for key, value in (metadata or {}).items())
                notes.append(f"the prefix '{missing}' was added to the keys")
        known = [key for key in state if key not in shapes and NO_WEIGHT.search(key)]
        state = OrderedDict((key, value) for key, value in state.items() if key not in known)
        known = [key for key in known if not key.endswith('num_batches_tracked')]
        if known:
            notes.append(f'{len(known)} entries that are not weights ({_some(known, 2)}) are left out')
    for key in [key for key in state if key in shapes and NO_WEIGHT.search(key) and state[key].shape != shapes[key]]:
        del state[key]  # remove a mask or index for images of a different size
    state._metadata = metadata
    return Fit(state, notes)


def own_shapes(model: nn.Module) -> Dict[str, torch.Size]:
    """Return names and shapes of a model's parameters and saved buffers, without wrappers and the diffusion module."""
    return {key: value.shape for key, value in _own_tensors(model).items()}


def _own_tensors(model: nn.Module, prefix: str = '') -> Dict[str, torch.Tensor]:
    if is_model_wrapper(model):
        return _own_tensors(model.module, prefix)
    buffers = {key: value for key, value in model._buffers.items() if key not in model._non_persistent_buffers_set}
    tensors = {prefix + key: value for key, value in {**model._parameters, **buffers}.items() if value is not None}
    for name, child in model._modules.items():
        if child is not None and f'{prefix}{name}.' != PREFIX:
            path = prefix if name == '_checkpoint_wrapped_module' else f'{prefix}{name}.'
            tensors.update(_own_tensors(child, path))
    return tensors


def _check_values(weights: Dict[str, torch.Tensor], model: nn.Module, source: str) -> None:
    """Refuse weights without values, sparse, complex and quantized weights, and weights that are not finite."""
    own = _own_tensors(model)
    # check only parameters: buffers may be masks with infinity, or integers in older versions of a model
    learned = {key for key, value in own.items() if isinstance(value, nn.Parameter) and value.is_floating_point()}
    weights = {key: value for key, value in weights.items() if key in own and not NO_WEIGHT.search(key)}
    if empty := [key for key, value in weights.items() if value.is_meta]:
        raise ValueError(
            f'{source} holds names and shapes but no values for {_some(empty, 2)}: the model was on the meta device '
            'when it was saved.'
        )
    for key, value in weights.items():
        if value.layout is not torch.strided or value.is_complex():
            kind = 'complex' if value.is_complex() else 'sparse'
            raise ValueError(
                f'{source} holds the weight {key} as a {kind} tensor; save all weights as dense, real tensors.'
            )
        if key in learned and (not value.is_floating_point() or value.element_size() < 2):
            raise ValueError(
                f'{source} holds the weight {key} as {str(value.dtype)[6:]}, so it is probably quantized: use the '
                'weights before quantization, in float32, float16 or bfloat16.'
            )
    floating = {key: value for key, value in weights.items() if value.is_floating_point()}
    broken = [key for key, value in floating.items() if (~value.isfinite() if key in learned else value.isnan()).any()]
    if broken:
        raise ValueError(
            f'{source} holds values that are not finite (NaN or infinity) in {_some(broken, 2)}: the training '
            'diverged, or the file is damaged. Use an earlier checkpoint.'
        )


def fit_on_load(model: nn.Module, state_dict: dict, source: str, model_name: str) -> None:
    """Rename weights in place before a model loads them, and check that they match at least one of its weights.

    Args:
        model (nn.Module): The model, for example the student.
        state_dict (dict): The weights; changed in place.
        source (str): Description of the checkpoint for messages.
        model_name (str): Description of the model for messages.

    Raises:
        ValueError: If no weight of the checkpoint matches the model, or weights are quantized, not finite, or without
            values.
    """
    shapes = own_shapes(model)
    if any('flat_param' in name for name in shapes) or any('_fsdp' in name for name, _ in model.named_parameters()):
        return  # FSDP changes names and shapes, so they cannot be compared
    # a checkpoint of a different project, which does not store its weights under state_dict
    if not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        content = dict(state_dict)
        state_dict.clear()
        with suppress(KeyError):
            state_dict.update(find_state_dict(content)[1])
    weights, notes = fit_weights(state_dict, shapes)
    own = [key for key in shapes if not NO_WEIGHT.search(key)]
    filled = {key for key in own if key in weights and weights[key].shape == shapes[key]}
    if own and not filled:
        raise ValueError(
            f'{source} fills none of the {len(own)} weights of {model_name}: {_reason(weights, shapes)}. Use a file of '
            "this model; init_cfg=dict(type='Pretrained', checkpoint=...) loads a file of a single module."
        )
    _check_values({key: weights[key] for key in filled}, model, source)
    _log(source, notes)
    if 2 * len(filled) < len(own) or _misshapen(weights, {key: shapes[key] for key in own}):
        rest = [key for key in own if key not in filled]
        print_log(
            f'{source} fills {len(filled)} of the {len(own)} weights of {model_name}; the others keep their initial '
            f'values: {_some(rest)}.',
            'current',
            WARNING,
        )
    diffusion = {key: value for key, value in state_dict.items() if key.startswith(PREFIX)}
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None and weights._metadata:
        metadata.update(weights._metadata)
    state_dict.clear()
    state_dict.update(weights)
    state_dict.update(diffusion)


@contextmanager
def use_checked_files(model: nn.Module) -> Iterator[None]:
    """Check the checkpoints in the ``init_cfg`` of a model and its modules, and load the checked files.

    In the context, ``init_cfg`` names the local file, and :func:`fit_on_load` fits its weights to the module.

    Args:
        model (nn.Module): The model to initialize.

    Raises:
        FileNotFoundError, ValueError: See :func:`mmdiffkd.engine.checkpoint.read_checkpoint`. Also if a file has no
            weights under the ``prefix`` in ``init_cfg``.
    """
    handles, restored = [], []
    try:
        for path, module in model.named_modules():
            name = f"'{path}'" if path else 'the model'
            for cfg in _pretrained_cfgs(getattr(module, 'init_cfg', None)):
                source = cfg['checkpoint']
                file, content = on_all_ranks(partial(check_and_read, source))
                if cfg.get('prefix') and isinstance(content, dict):
                    _check_prefix(with_state_dict(content, source)[STATE], cfg['prefix'], source, name)
                restored.append((cfg, source))
                cfg['checkpoint'] = file
                hook = partial(_fit_module, module, f"The checkpoint '{source}'", name)
                handles.append(module._register_load_state_dict_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for cfg, source in restored:
            cfg['checkpoint'] = source


def fit_loaded_weights(model: nn.Module, source: str) -> None:
    """Make a Runner's model rename the weights of a checkpoint to its own names when the Runner loads them.

    Args:
        model (nn.Module): The model, perhaps in a wrapper.
        source (str): Path or URL of the checkpoint for messages.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    source = f"The checkpoint '{source}'"
    if hasattr(model, 'distill_state'):  # a distiller always renames weights; here it gets the source for messages
        model.distill_state.checkpoint = source
    else:
        model._register_load_state_dict_pre_hook(partial(_fit_module, model, source, 'the model'))


def _check_prefix(state_dict: dict, prefix: str, source: str, name: str) -> None:
    if not any(key.startswith(f'{prefix.rstrip(".")}.') for key in state_dict):
        first = sorted({key.split('.')[0] for key in state_dict})
        raise ValueError(
            f"init_cfg of {name} loads the weights under prefix='{prefix}' of '{source}', but its keys start with "
            f'{_some([repr(part) for part in first])}; change or remove the prefix.'
        )


def _fit_module(module: nn.Module, source: str, name: str, state_dict: dict, prefix: str, *args) -> None:
    if not prefix:  # with a prefix, the state dict belongs to a larger model that contains this module
        fit_on_load(module, state_dict, source, name)


def _pretrained_cfgs(init_cfg) -> List[dict]:
    """Return the dicts in an ``init_cfg`` that name a checkpoint."""
    if isinstance(init_cfg, (list, tuple)):
        return [cfg for entry in init_cfg for cfg in _pretrained_cfgs(entry)]
    if not isinstance(init_cfg, dict):
        return []
    return [*([init_cfg] if init_cfg.get('checkpoint') else []), *_pretrained_cfgs(init_cfg.get('override'))]


def load_strict(model: nn.Module, state_dict: dict, model_name: str, source: str) -> None:
    """Load weights into a teacher; all keys and shapes must match after :func:`fit_weights`.

    The diffusion module of a distilled checkpoint (``diffkd.*``) is ignored, so a distilled student can be a teacher.

    Args:
        model (nn.Module): Model to load the weights into.
        state_dict (dict): The weights.
        model_name (str): Description of the model for the error message.
        source (str): Path or URL of the weights for the error message.

    Raises:
        ValueError: If keys are missing or unexpected, or shapes differ; the message lists the keys. Also if weights
            are quantized, not finite, or without values.
    """
    shapes = own_shapes(model)
    try:
        state, notes = fit_weights(state_dict, shapes, is_teacher=True)
    except ValueError as error:
        raise ValueError(f'It is not clear which weights of {source} belong to {model_name}: {error}') from None
    remark = ''.join(f' ({note})' for note in notes)
    if not state:
        raise ValueError(f'The weights of {source} do not fit {model_name}: the file holds no weights.')
    misshapen = _misshapen(state, shapes)
    if misshapen:
        raise ValueError(f'The weights of {source} do not fit {model_name}: {_some(misshapen)}{remark}.')
    _check_values(state, model, f'The checkpoint {source}')
    result = model.load_state_dict(state, strict=False)
    # keys that a module's load hook removed are not missing: the module computes the values itself
    missing = [key for key in result.missing_keys if key not in state and not NO_WEIGHT.search(key)]
    problems = [
        f'{kind} {_some(keys)}' for kind, keys in (('missing', missing), ('unexpected', result.unexpected_keys)) if keys
    ]
    if problems:
        hint = '' if set(shapes) & set(state) else f'. It seems that {_reason(state, shapes)}'
        raise ValueError(f'The weights of {source} do not fit {model_name}: {"; ".join(problems)}{remark}{hint}.')
    _log(source, notes)


def without_wrappers(state_dict: dict) -> OrderedDict:
    """Return a state dict without the names that wrappers insert, such as ``module.`` and ``_orig_mod.``."""
    return OrderedDict((WRAPPER.sub('', key), value) for key, value in state_dict.items())


def _without_copies(state: OrderedDict, notes: List[str]) -> OrderedDict:
    """Leave out the ``ema_*`` copies of every weight, which mmdet 2 and other projects save beside the weights."""
    starts = ((key, start) for key in state for start in (0, *(match.end() for match in re.finditer(r'\.', key))))
    copies = {f'{key[:start]}ema_{key[start:].replace(".", "_")}' for key, start in starts} & set(state)
    if copies:
        notes.append(f'{len(copies)} EMA copies (ema_*) are left out, the weights under the plain names are used')
    return OrderedDict((key, value) for key, value in state.items() if key not in copies)


def _prefixes(key: str, shapes: Dict[str, torch.Size]) -> List[str]:
    """List the prefixes whose removal turns a key into a name of the model; '' if the key is already such a name."""
    dots = [-1, *(match.start() for match in re.finditer(r'\.', key))]
    return [key[: dot + 1] for dot in dots if key[dot + 1 :] in shapes]


def _matches(state: dict, shapes: Dict[str, torch.Size], prefix: str) -> Tuple[int, int]:
    """Count the model's weights that the state dict has under a prefix: with the same shape, and with any shape."""
    named = [key for key in shapes if prefix + key in state]
    return sum(state[prefix + key].shape == shapes[key] for key in named), len(named)


def _choose_prefix(state: dict, shapes: Dict[str, torch.Size], prefixes: Counter, is_teacher: bool) -> str:
    """Choose the prefix under which most weights fit the model; '' if the keys fit best without removing a prefix.

    If the file holds several models of the same architecture, their weights fit equally well. Then choose the weights
    of a teacher for a teacher, otherwise those of the model that is neither a teacher nor an averaged copy.
    """
    if not prefixes:
        return ''
    scores = {prefix: _matches(state, shapes, prefix) for prefix in prefixes}
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if is_teacher:
        best = [prefix for prefix in best if TEACHER.search(prefix)] or best
    else:
        best = [prefix for prefix in best if not TEACHER.search(prefix)] or best
    best = [prefix for prefix in best if not COPY.search(prefix)] or best
    if '' in best:
        return ''
    prefix = best[0]
    if len(best) > 1:
        if scores[prefix][1] < sum(not NO_WEIGHT.search(key) for key in shapes):
            return ''  # only a few names fit, and only by chance
        raise ValueError(
            f'weights under {" and ".join(map(repr, best))} fit equally well; save only the weights of one model with '
            'torch.save and use that file'
        )
    group = sum(key.startswith(prefix) for key in state)
    return prefix if 2 * prefixes[prefix] >= group else ''


def _under(prefix: str, state: dict, notes: List[str]) -> OrderedDict:
    """Return the entries under a prefix, without the prefix."""
    rest = Counter(key.split('.')[0] + '.' * ('.' in key) for key in state if not key.startswith(prefix))
    rest = {name: count for name, count in rest.items() if not NO_WEIGHT.search(name)}
    clause = f"the prefix '{prefix}' of the keys was removed"
    if rest:
        others = _some([f"{count} under '{name}'" if name.endswith('.') else name for name, count in rest.items()])
        clause = f"the weights under '{prefix}' are used, and {others} are left out"
    notes.append(clause)
    return OrderedDict((key[len(prefix) :], value) for key, value in state.items() if key.startswith(prefix))


def _misshapen(state: dict, shapes: Dict[str, torch.Size]) -> List[str]:
    return [
        f'{key} ({_shape(state[key].shape)} in the file, {_shape(shapes[key])} in the model)'
        for key in shapes
        if key in state and state[key].shape != shapes[key]
    ]


def _missing_prefix(state: dict, shapes: Dict[str, torch.Size], whole: bool = False) -> str:
    """Return the prefix whose addition turns at least half of the keys into names of the model; '' if there is none.

    Args:
        state (dict): The weights.
        shapes (dict[str, torch.Size]): Names and shapes of the model.
        whole (bool): Whether the keys must match all weights of the model, and no key may be left. Defaults to False.
    """
    prefixes = Counter(
        key[: -len(suffix)]
        for key in shapes
        for suffix in (key[match.end() :] for match in re.finditer(r'\.', key))
        if suffix in state and state[suffix].shape == shapes[key]
    )
    if not prefixes:
        return ''
    ((prefix, count),) = prefixes.most_common(1)
    if whole:
        own = sum(not NO_WEIGHT.search(key) for key in shapes)
        keys = [key for key in state if not NO_WEIGHT.search(key)]
        return prefix if len(keys) == own and all(prefix + key in shapes for key in keys) else ''
    return prefix if 2 * count >= len(state) else ''


def _reason(state: dict, shapes: Dict[str, torch.Size]) -> str:
    """Return the clause of an error message that says why no weight fits."""
    if not state:
        return 'it holds no weights'
    misshapen = _misshapen(state, shapes)
    if misshapen:
        return f'the names fit, but not the shapes: {_some(misshapen, 2)}'
    prefix = _missing_prefix(state, shapes)
    if prefix:
        return f"its keys are those of the model's {prefix[:-1]} only"
    return f"its keys have different names ('{next(iter(state), '')}' in the file, '{next(iter(shapes))}' in the model)"


def _log(source: str, notes: List[str]) -> None:
    if notes:
        print_log(f'{source}: {"; ".join(notes)}.', 'current')


def _shape(shape) -> str:
    return 'x'.join(map(str, shape)) or 'scalar'


def _some(items: list, count: int = 4) -> str:
    rest = f' and {len(items) - count} more' if len(items) > count else ''
    return ', '.join(items[:count]) + rest
