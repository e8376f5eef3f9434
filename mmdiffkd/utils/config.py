"""Where a config and its weights are found: in an installed package, in a file, or in place."""

import copy
import os.path as osp
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional, Tuple, Union

from mmengine.config import Config, ConfigDict
from mmengine.fileio import load

from .suggest import nearest

ConfigSource = Union[str, Path, dict]


def resolve_config(source: ConfigSource) -> Config:
    """Read a config by name, from a file, or from a dict.

    ``pkg::path`` is looked up through the import name, which works for both families of packages.

    Args:
        source (str, Path or dict): ``'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'``, a local file, or a dict that
            is a whole config or a model alone.

    Returns:
        Config: A config with the key ``model``.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the config describes no model.
        TypeError: If ``source`` is none of the above.
    """
    if isinstance(source, dict):
        cfg = Config(dict(source) if 'model' in source else dict(model=dict(source)))
    elif isinstance(source, (str, Path)):
        cfg = Config.fromfile(_config_file(str(source)))
    else:
        raise TypeError(f'A config must be a path, pkg::path or a dict, not {type(source).__name__}.')
    if not isinstance(cfg.get('model'), dict) or 'type' not in cfg.model:
        raise ValueError(f"The config {_name(source)} describes no model: there is no 'model' with a 'type' in it.")
    return cfg


def model_of(cfg: Config) -> ConfigDict:
    """The model of a config, with the config's scope, so that it builds under any default scope, and preprocessor."""
    model = copy.deepcopy(ConfigDict(cfg.model))  # some models change their config while they are built
    if model.get('_scope_') is None and cfg.get('default_scope') is not None:
        model['_scope_'] = cfg.default_scope
    return with_preprocessor(model, cfg.get('data_preprocessor'))


def with_preprocessor(model: ConfigDict, preprocessor: Optional[dict]) -> ConfigDict:
    """Give a model the top-level preprocessor, which the Runner hands over, where it has none of its own."""
    if model.get('data_preprocessor') is None and preprocessor is not None:
        model['data_preprocessor'] = copy.deepcopy(preprocessor)
    return model


def preprocessor_of(cfg: Config) -> Optional[dict]:
    """The data preprocessor of a config: the model's own, or the top-level one (mmpretrain's way)."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')


def imports_of(cfg: Config) -> List[str]:
    """The modules that a config imports (``custom_imports``), but for this package's."""
    names = (cfg.get('custom_imports') or {}).get('imports') or []
    return [name for name in ([names] if isinstance(names, str) else names) if name.split('.')[0] != 'mmdiffkd']


def image_channels(preprocessor: Optional[dict]) -> int:
    """Channels of the images that a data preprocessor takes: as many as it has means for, usually three."""
    return len((preprocessor or {}).get('mean') or 'RGB')


def zoo_checkpoint(source: ConfigSource) -> str:
    """The weights that a package's model index lists for one of its configs.

    Args:
        source (str): ``pkg::path`` of the config.

    Returns:
        str: URL of the weights.

    Raises:
        ValueError: If ``source`` is no ``pkg::path`` or the model index lists no weights for it.
    """
    if not isinstance(source, str) or '::' not in source:
        raise ValueError(
            f"checkpoint='zoo' needs a config of an installed package such as 'mmdet::retinanet/...', not "
            f'{_name(source)}; give a path or URL instead.'
        )
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
        f'{nearest(wanted, listed)}.'
    )


def _config_file(source: str) -> str:
    if '::' not in source:
        if not osp.isfile(source):
            raise FileNotFoundError(
                f"The config file '{source}' does not exist (looked from {osp.abspath('.')}); configs of a package are "
                "named like 'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'."
            )
        return source
    mim, path = _split(source)
    file = mim / 'configs' / path
    if not file.is_file():
        known = [p.relative_to(mim / 'configs').as_posix() for p in (mim / 'configs').rglob('*.py')]
        raise FileNotFoundError(f"There is no config '{source}'; the nearest are {nearest(path, known)}.")
    return str(file)


def _split(source: str) -> Tuple[Path, str]:
    package, path = source.split('::', 1)
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The package '{package}' of the config '{source}' is not installed.")
    mim = Path(list(spec.submodule_search_locations)[0]) / '.mim'
    if not mim.is_dir():
        raise FileNotFoundError(f"The package '{package}' ships no configs (no folder {mim}).")
    return mim, path


def _name(source: ConfigSource) -> str:
    return 'given in place' if isinstance(source, dict) else f"'{source}'"
