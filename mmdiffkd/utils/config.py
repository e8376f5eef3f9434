"""Find and read configs from installed packages, files and dicts, and return the model of a config."""

import copy
import inspect
import os.path as osp
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from .check_config import check_run_config, closest_names

ConfigSource = Union[str, Path, dict]
CONFIG_SUFFIXES = ('.py', '.yml', '.yaml', '.json')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


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
        raise ValueError(f"The config ({source_name(source)}) has no model: it needs a 'model' dict with a 'type'.")
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


def flatten_settings(value: Any, path: str = '') -> Dict[str, Any]:
    """Return nested settings as one dict, such as ``{'model.backbone.depth': 50}``. Tuples become lists."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(member, dict) for member in value):
        items = enumerate(value)
    else:
        return {path: list(value) if isinstance(value, tuple) else value}
    flat = {}
    for key, member in items:
        flat.update(flatten_settings(member, f'{path}.{key}' if path else str(key)))
    return flat


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
    mim, path = package_configs(source)
    file = mim / 'configs' / path
    if not file.is_file():
        known = [p.relative_to(mim / 'configs').as_posix() for p in (mim / 'configs').rglob('*.py')]
        raise FileNotFoundError(f"There is no config '{source}'; the nearest are {closest_names(path, known)}.")
    return str(file)


def package_configs(source: str) -> Tuple[Path, str]:
    """Split ``pkg::path`` into the folder of the package that contains ``configs`` and the model index, and the path.

    Raises:
        FileNotFoundError: If the package contains no configs.
        ModuleNotFoundError: If the package is not installed.
    """
    package, path = source.split('::', 1)
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The package '{package}' of the config '{source}' is not installed.")
    mim = Path(list(spec.submodule_search_locations)[0]) / '.mim'
    if not mim.is_dir():
        raise FileNotFoundError(f"The package '{package}' ships no configs (the folder {mim} does not exist).")
    return mim, path


def source_name(source: ConfigSource) -> str:
    """Return the quoted path of a config, or ``'a dict'``, for error messages."""
    return 'a dict' if isinstance(source, dict) else f"'{source}'"
