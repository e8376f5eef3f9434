"""Find and read configs from installed packages, files and dicts, and look up settings in configs."""

import copy
import difflib
import inspect
import os.path as osp
from importlib.util import find_spec
from logging import WARNING
from math import ceil
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple, Union

from mmengine.config import Config, ConfigDict
from mmengine.fileio import load
from mmengine.logging import print_log
from mmengine.registry import MODELS

ConfigSource = Union[str, Path, dict]
CONFIG_SUFFIXES = ('.py', '.yml', '.yaml', '.json')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# arguments of the distiller that check_run_config() looks for at the top level of a config
DISTILLER_KEYS = ('distill', 'teacher', 'preset', 'init_from_teacher')
# keys that have been renamed: {old name: new name}
RENAMED_KEYS = dict(
    backprop_steps='num_grad_steps',
    distance='loss_kd',
    floor='min_score',
    inherit='init_from_teacher',
    schedule='scheduler',
)


def resolve_config(source: ConfigSource) -> Config:
    """Read a config of an installed package, from a local file, or from a dict.

    Args:
        source (str, Path or dict): One of the following:

            * a config of a package, ``'pkg::path'``, such as ``'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'``.
              ``pkg`` is the import name of the package, so maintained forks of the OpenMMLab packages work, too.
            * the path of a local file
            * a dict with a whole config, or only with the config of a model
            * an image encoder of timm, torchvision or transformers; see :func:`.encoder_config`

    Returns:
        Config: A config with the key ``model``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the config cannot be read or has no model, or ``source`` is not a str, Path or dict.
    """
    # import here, because mmdiffkd.models imports this module
    from mmdiffkd.models.encoders import encoder_config, is_library_source

    if isinstance(source, (str, dict)) and is_library_source(source):
        cfg = encoder_config(source)
    elif isinstance(source, dict):
        cfg = Config(dict(source) if 'model' in source else dict(model=dict(source)))
    elif isinstance(source, (str, Path)):
        cfg = load_config(_config_file(str(source)))
    else:
        raise ValueError(f'A config must be a path, pkg::path or a dict, not {type(source).__name__}.')
    if not isinstance(cfg.get('model'), dict) or 'type' not in cfg.model:
        raise ValueError(f"The config ({_name(source)}) has no model: it needs a 'model' dict with a 'type'.")
    return cfg


def read_config(config: Union[str, Path, Config], cfg_options: Optional[dict] = None) -> Config:
    """Read a config and apply overrides, as the tools do.

    Args:
        config (str, Path or Config): Path of the config, ``pkg::path``, or a loaded config. A loaded config is copied.
        cfg_options (dict, optional): Overrides, as ``--cfg-options`` gives them on the command line.

    Returns:
        Config: A config with the key ``model``.

    Raises:
        FileNotFoundError, ImportError: If the config, its package or a module of ``custom_imports`` does not exist.
        ValueError: If the config cannot be read, has no model, or has settings in the wrong place.
    """
    cfg = copy.deepcopy(config) if isinstance(config, Config) else resolve_config(config)
    cfg.merge_from_dict(cfg_options or {})
    check_run_config(cfg)
    return cfg


def load_config(file: Union[str, Path]) -> Config:
    """Read a config file.

    Raises:
        ImportError: If a module in ``custom_imports`` cannot be imported.
        ValueError: If the config, or a config that it inherits, is not valid Python or not saved as UTF-8.
    """
    try:
        return Config.fromfile(file)
    except SyntaxError as error:
        text = str(error).replace('<unknown>, ', '')
        if 'U+FEFF' in text:
            raise ValueError(
                f"The config '{file}', or a config that it inherits, starts with a byte order mark: save it as UTF-8 "
                'without BOM.'
            ) from error
        raise ValueError(f"The config '{file}', or a config that it inherits, is not valid Python: {text}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The config '{file}', or a config that it inherits, is not saved as UTF-8 ({error}): save it as UTF-8."
        ) from error
    except ImportError as error:
        # the message of this error lists all folders of sys.path, so replace it by a shorter one
        if not str(error).startswith('Failed to import custom modules'):
            raise
        cause = error.__cause__ or error.__context__ or error
        cause = cause.__cause__ or cause.__context__ or cause
        raise ImportError(
            f"custom_imports of '{file}' cannot be imported: {cause}. Check the spelling, or set PYTHONPATH to the "
            'folder of the module.'
        ) from error


def check_run_config(cfg: Config) -> None:
    """Check settings that would be ignored, or would fail later with an unclear message.

    Raises:
        ValueError: If a setting of the distiller is at the top level of the config and not in ``model``, or if
            ``custom_hooks`` is not a list.
    """
    model = cfg.get('model')
    for key in DISTILLER_KEYS if isinstance(model, dict) and 'student' in model else ():
        others = {name: value for name, value in cfg.items() if name != key}
        parts = cfg[key].values() if isinstance(cfg.get(key), dict) else [cfg.get(key)]
        # ignore a variable of the config file that is used elsewhere in the config: it may have any name
        if not cfg.get(key) or _is_part(cfg[key], others) or all(_is_part(part, others) for part in parts):
            continue
        text = f'{key} has no effect at the top level of the config: set it in the model, model=dict({key}=...).'
        if key not in model:
            raise ValueError(text)
        print_log(text, 'current', WARNING)  # no error: it may be a variable, and a child config has changed the model
    hooks = cfg.get('custom_hooks')
    if hooks is not None and not isinstance(hooks, (list, tuple)):
        raise ValueError('custom_hooks must be a list, such as custom_hooks=[dict(type=...)].')


def _is_part(value, cfg) -> bool:
    """Return whether a config equals a value or contains it at any depth."""
    if value == cfg:
        return True
    members = cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, (list, tuple)) else ()
    return any(_is_part(value, member) for member in members)


def get_model_cfg(cfg: Config) -> ConfigDict:
    """Return the model of a config, together with its preprocessor and its registry scope.

    The returned model can be built under any default scope.
    """
    model = copy.deepcopy(ConfigDict(cfg.model))  # some models modify their config while they are built
    if model.get('_scope_') is None and cfg.get('default_scope') is not None:
        model['_scope_'] = cfg.default_scope
    return with_preprocessor(model, cfg.get('data_preprocessor'))


def get_teacher_cfg(cfg: Config) -> ConfigDict:
    """Return the model of a teacher's config, as :func:`get_model_cfg` does.

    The key ``data_preprocessor`` is removed if the model's class, for example a class of timm, has no such argument.
    """
    model = get_model_cfg(cfg)
    kind = model['type']
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(model.get('_scope_')) as registry:
            kind = registry.get(kind)
    if kind is not None and 'data_preprocessor' in model:
        parameters = inspect.signature(kind).parameters.values()
        if not any(p.name == 'data_preprocessor' or p.kind is p.VAR_KEYWORD for p in parameters):
            del model['data_preprocessor']
    return model


def with_preprocessor(model: ConfigDict, preprocessor: Optional[dict]) -> ConfigDict:
    """Add a config's top-level preprocessor to the model if the model has none, as the Runner does.

    Args:
        model (dict): Config of the model, changed in place.
        preprocessor (dict, optional): Top-level ``data_preprocessor`` of the config.
    """
    if model.get('data_preprocessor') is None and preprocessor is not None:
        model['data_preprocessor'] = copy.deepcopy(preprocessor)
    return model


def type_name(kind) -> str:
    """Return the class name for the ``type`` in a config, which may be a name, a path or a class.

    >>> type_name(RetinaNet), type_name('mmdet.RetinaNet'), type_name('mmdet.models.detectors.retinanet.RetinaNet')
    ('RetinaNet', 'RetinaNet', 'RetinaNet')
    """
    return kind.__name__ if hasattr(kind, '__name__') else str(kind).rpartition('.')[2]


def comparable(value):
    """Return settings in a form that is equal for text, pure Python, dumped and YAML configs of the same module."""
    if isinstance(value, dict):
        kept = {key: comparable(item) for key, item in value.items() if key != '_scope_'}
        return dict(kept, type=type_name(value['type'])) if 'type' in value else kept
    return [comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def with_named_types(value):
    """Return settings with all classes and functions replaced by their names, as in a text config."""
    if isinstance(value, dict):
        return {key: with_named_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_named_types(item) for item in value)
    if not hasattr(value, '__qualname__'):
        return value
    in_mmdiffkd = value.__module__.split('.')[0] == 'mmdiffkd'
    return f'mmdiffkd.{value.__name__}' if in_mmdiffkd else f'{value.__module__}.{value.__qualname__}'


def package_of(cfg: Config) -> Optional[str]:
    """Return the name of the package that a config belongs to, such as ``'mmdet'``; None if unknown.

    The name is the default scope of the config, or else the package of its model's class.
    """
    if cfg.get('default_scope') is not None:
        return cfg.default_scope
    model = cfg.get('model') or {}
    kind = (model.get('student') or model).get('type')
    path = kind if isinstance(kind, str) else getattr(kind, '__module__', '')
    return path.split('.')[0] if '.' in path else None


def set_loader_defaults(cfg: Config, names: Sequence[str] = LOADERS) -> None:
    """Set, in place, the dataloader defaults of mmpretrain's ``train.py``. Configs of other packages are not changed.

    Args:
        cfg (Config): Config of a run.
        names (sequence[str]): Keys of the dataloaders. Defaults to the three dataloaders of a run.
    """
    if package_of(cfg) != 'mmpretrain':
        return
    for loader in filter(None, map(cfg.get, names)):
        loader.setdefault('pin_memory', True)
        # torch raises an error for persistent_workers without workers
        loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
        loader.setdefault('collate_fn', dict(type='default_collate'))


def get_preprocessor_cfg(cfg: Config) -> Optional[dict]:
    """Return the data preprocessor in the model of a config, or else the one at the top level, as in mmpretrain."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')


def get_custom_imports(cfg: Config) -> List[str]:
    """Return the modules in ``custom_imports`` of a config, except modules of mmdiffkd."""
    names = (cfg.get('custom_imports') or {}).get('imports') or []
    return [name for name in ([names] if isinstance(names, str) else names) if name.split('.')[0] != 'mmdiffkd']


# attributes of OpenMMLab models that hold the image encoder
ENCODERS = ('backbone', 'image_encoder', 'vision_backbone', 'vision_encoder', 'visual_encoder')
# attributes of trackers and semi-supervised models that hold a whole detector
WRAPPED = ('detector', 'student')
# arguments of image encoders that set the number of image channels
CHANNEL_KEYS = ('in_channels', 'in_chans', 'img_channels')


def image_channels(model_cfg: dict) -> Tuple[int, ...]:
    """Return the numbers of channels that a model's images may have, the most likely first.

    Args:
        model_cfg (dict): Config of the model with its preprocessor.

    Returns:
        tuple[int]: The ``in_channels`` of the image encoder if it is set, then the length of the preprocessor's
        ``mean``. If there is no ``mean``, 3 and 1 instead of its length.
    """
    found = []
    parts = [model_cfg]
    for part in parts:
        parts += [part[name] for name in (*ENCODERS, *WRAPPED) if isinstance(part.get(name), dict)]
        found += [part[key] for key in CHANNEL_KEYS if isinstance(part.get(key), int)]
    preprocessor = model_cfg.get('data_preprocessor') or {}
    while preprocessor.get('mean') is None and isinstance(preprocessor.get('data_preprocessor'), dict):
        preprocessor = preprocessor['data_preprocessor']
    mean = preprocessor.get('mean') or ()
    means = len(mean) if isinstance(mean, (list, tuple)) else 1
    # a mean with a single value may be for one channel or for all of three channels
    usual = {0: (3, 1), 1: (1, 3)}.get(means, (means,))
    return tuple(dict.fromkeys([*found, *usual]))


def pipeline_normalization(cfg: Config) -> Optional[dict]:
    """Return how the pipeline of a config normalizes images, as pipelines for OpenMMLab 1.x do.

    Args:
        cfg (Config): Config with data sets.

    Returns:
        dict, optional: ``mean``, ``std`` and ``to_rgb`` of the last ``Normalize`` step. Empty if no pipeline
            normalizes images, and None if the config has no pipeline.
    """
    found = None
    for key in ('train_dataloader', 'test_dataloader', 'val_dataloader', 'data', 'train_pipeline', 'test_pipeline'):
        steps = list(_normalize_steps(cfg.get(key)))
        found = {} if cfg.get(key) else found
        if steps:
            return dict(mean=list(steps[-1]['mean']), std=list(steps[-1]['std']), to_rgb=steps[-1].get('to_rgb', True))
    return found


def _normalize_steps(cfg) -> Iterator[dict]:
    for step in _typed_dicts(cfg):
        if type_name(step['type']) == 'Normalize' and step.get('mean') and step.get('std'):
            yield step


def _typed_dicts(cfg) -> Iterator[dict]:
    """Yield all dicts with a type in a config, in order."""
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield cfg
        cfg = list(cfg.values())
    if isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from _typed_dicts(value)


RGB_DATASETS = ('CIFAR10', 'CIFAR100')  # data sets of mmpretrain that contain RGB images and need no loading step


def loaded_order(cfg: Config) -> Optional[str]:
    """Return the color order of the images that a config's training pipeline returns.

    Returns:
        str, optional: ``'BGR'`` or ``'RGB'``; None if the order is unknown.
    """
    order = None
    for step in _typed_dicts((cfg.get('train_dataloader') or {}).get('dataset')):
        kind = type_name(step['type'])
        if kind in RGB_DATASETS:
            order = 'RGB'
        elif kind == 'LoadImageFromFile':
            order = 'BGR'
        elif order and (kind, True) in (('NumpyToPIL', step.get('to_rgb')), ('PILToNumpy', step.get('to_bgr'))):
            order = 'RGB' if order == 'BGR' else 'BGR'
    return order


def zoo_checkpoint(source: ConfigSource) -> str:
    """Look up the weights of a config in the model index of its package.

    Args:
        source (str): ``pkg::path`` of the config.

    Returns:
        str: URL of the weights.

    Raises:
        ValueError: If ``source`` is not ``pkg::path``, or the model index lists no weights for the config.
    """
    if problem := zoo_problem(source):
        raise ValueError(f'checkpoint{problem}')
    mim, path = _split(source)
    wanted = Path(path).with_suffix('').as_posix()
    listed = []
    for metafile in load(str(mim / 'model-index.yml'))['Import']:
        models = load(str(mim / metafile)) or {}
        for model in models['Models'] if isinstance(models, dict) else models:
            name = Path(model.get('Config', '')).with_suffix('').as_posix()
            if name == f'configs/{wanted}' and model.get('Weights'):
                return model['Weights']
            if model.get('Weights'):
                listed.append(name[len('configs/') :])
    raise ValueError(
        f'The model index lists no weights for {source}; the nearest configs with weights are '
        f'{closest_names(wanted, listed)}.'
    )


def zoo_problem(source: ConfigSource) -> Optional[str]:
    """Return why a teacher's checkpoint cannot be ``'zoo'``, as the end of a sentence; None if it can be."""
    from mmdiffkd.models.encoders import is_library_source

    if is_library_source(source):
        return f"='zoo' is for configs of OpenMMLab's packages: for {_name(source)}, use 'pretrained'."
    if not isinstance(source, str) or '::' not in source:
        return (
            f"='zoo' needs a config of an installed package such as 'mmdet::retinanet/...', not {_name(source)}; give "
            'the path or URL of the weights instead.'
        )
    return None


def _config_file(source: str) -> str:
    if '::' not in source:
        if osp.isdir(source):
            raise ValueError(f"The config '{source}' is a folder; give a config file.")
        if osp.isfile(source) and Path(source).suffix not in CONFIG_SUFFIXES:
            raise ValueError(f"'{source}' is not a config: configs are files with {', '.join(CONFIG_SUFFIXES)}.")
        if not osp.isfile(source):
            raise FileNotFoundError(
                f"The config file '{source}' does not exist (working directory: {osp.abspath('.')}); configs of a "
                "package have names like 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'."
            )
        return source
    mim, path = _split(source)
    file = mim / 'configs' / path
    if not file.is_file():
        known = [p.relative_to(mim / 'configs').as_posix() for p in (mim / 'configs').rglob('*.py')]
        raise FileNotFoundError(f"There is no config '{source}'; the nearest are {closest_names(path, known)}.")
    return str(file)


def _split(source: str) -> Tuple[Path, str]:
    package, path = source.split('::', 1)
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The package '{package}' of the config '{source}' is not installed.")
    mim = Path(list(spec.submodule_search_locations)[0]) / '.mim'
    if not mim.is_dir():
        raise FileNotFoundError(f"The package '{package}' ships no configs (the folder {mim} does not exist).")
    return mim, path


def _name(source: ConfigSource) -> str:
    return 'a dict' if isinstance(source, dict) else f"'{source}'"


Size = Tuple[int, int]
USUAL_SIZES = dict(mmdet=(800, 1344), mmseg=(512, 1024), mmpretrain=(224, 224))
SIZE_KEYS = ('crop_size', 'scale', 'scales', 'img_scale')  # arguments of transforms that set (width, height)


def image_size(cfg: Config) -> Size:
    """Return the height and width of the images in the training of a config.

    The size is the first of these that exists:

    * ``size`` of the student's preprocessor
    * ``image_size`` of the config, (width, height)
    * the size of the last resize or crop in the training pipeline
    * the usual size of the package

    Args:
        cfg (Config): Distillation config, or config of a plain model.

    Returns:
        tuple[int, int]: Height and width.
    """
    preprocessor = cfg.model.get('student', cfg.model).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if preprocessor.get('size'):
        return tuple(preprocessor['size'])
    pipelines = [
        dataset.get('pipeline') for dataset in nested_datasets((cfg.get('train_dataloader') or {}).get('dataset'))
    ]
    size = cfg.get('image_size') or next(filter(None, map(_pipeline_size, filter(None, pipelines))), None)
    if size is None:
        return USUAL_SIZES.get(package_of(cfg), (224, 224))
    width, height = size
    divisor = preprocessor.get('pad_size_divisor', 1)
    return ceil(height / divisor) * divisor, ceil(width / divisor) * divisor


def nested_datasets(dataset: Union[dict, Sequence[dict], None]) -> Iterator[dict]:
    """Yield the config of a dataset, and then the configs of the datasets that it contains, as ``ConcatDataset`` does.

    Args:
        dataset (dict or list[dict], optional): Config of a dataset, or of several. None yields nothing.
    """
    if isinstance(dataset, (list, tuple)):
        for member in dataset:
            yield from nested_datasets(member)
    elif isinstance(dataset, dict):
        yield dataset
        yield from nested_datasets(dataset.get('dataset') or dataset.get('datasets'))


def _pipeline_size(steps: Sequence[dict]) -> Optional[Size]:
    for step in reversed(steps):
        branches = step.get('transforms')
        size = _pipeline_size(branches[0]) if branches and isinstance(branches[0], (list, tuple)) else _step_size(step)
        if size is not None:
            return size
    return None


def _step_size(step: dict) -> Optional[Size]:
    size = next((step[key] for key in SIZE_KEYS if step.get(key)), None)
    if isinstance(size, (list, tuple)) and isinstance(size[0], (list, tuple)):
        size = size[-1]  # the last of several scales is the largest
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (list, tuple)) or not all(isinstance(side, int) for side in size):
        return None  # the size is not in pixels, as in crops that are relative to the image size
    # with keep_ratio, (width, height) and (height, width) mean the same: assume that images are wider than high
    return (max(size), min(size)) if step.get('keep_ratio') else tuple(size)


def closest_names(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates closest to ``name``, quoted and joined for an error message."""
    candidates = list(candidates)
    # candidates that differ from the name only in upper and lower case
    same = [candidate for candidate in candidates if candidate.lower() == name.lower()]
    found = same or difflib.get_close_matches(name, candidates, n=count, cutoff=0.4) or candidates[:count]
    return ', '.join(f"'{candidate}'" for candidate in found)


def refuse_old_keys(keys: Iterable[str], where: str) -> None:
    """Raise an error if a config uses the old name of a renamed key.

    Args:
        keys (iterable[str]): Keys of a config.
        where (str): Name or path of the part of the config that has the keys, for the error message.

    Raises:
        ValueError: If a key has been renamed; the message gives the new name.
    """
    for key in keys:
        if key in RENAMED_KEYS:
            raise ValueError(f"{where} has no key '{key}': the key is now called '{RENAMED_KEYS[key]}'.")
