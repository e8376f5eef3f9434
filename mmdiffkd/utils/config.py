"""Find and read configs: in an installed package, in a file, or given as a dict."""

import copy
import difflib
import os.path as osp
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Iterable, List, Optional, Sequence, Tuple, Union

from mmengine.config import Config, ConfigDict
from mmengine.fileio import load

ConfigSource = Union[str, Path, dict]
# names of earlier versions
RENAMED_KEYS = dict(
    backprop_steps='num_grad_steps',
    distance='loss_kd',
    floor='min_score',
    inherit='init_from_teacher',
    schedule='scheduler',
)


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


def read_config(config: Union[str, Path, Config], cfg_options: Optional[dict] = None) -> Config:
    """Read a config as tools do.

    Args:
        config (str or Config): Path of the config, ``pkg::path``, or a config at hand, which stays as it is.
        cfg_options (dict, optional): Overrides, as on the command line.

    Returns:
        Config: A config with the key ``model``.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If it does not exist.
        ValueError: If it is no Python, or describes no model.
    """
    try:
        cfg = copy.deepcopy(config) if isinstance(config, Config) else resolve_config(config)
    except SyntaxError as error:
        raise ValueError(f"The config '{config}', or one that it inherits, is no Python: {error}.") from error
    cfg.merge_from_dict(cfg_options or {})
    return cfg


def get_model_cfg(cfg: Config) -> ConfigDict:
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


def get_preprocessor_cfg(cfg: Config) -> Optional[dict]:
    """The data preprocessor of a config: the model's own, or the top-level one (mmpretrain's way)."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')


def get_custom_imports(cfg: Config) -> List[str]:
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
        f'{closest_names(wanted, listed)}.'
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
        raise FileNotFoundError(f"There is no config '{source}'; the nearest are {closest_names(path, known)}.")
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


Size = Tuple[int, int]
USUAL_SIZES = dict(mmdet=(800, 1344), mmseg=(512, 1024), mmpretrain=(224, 224))
SIZE_KEYS = ('crop_size', 'scale', 'scales', 'img_scale')  # of transforms, as (width, height)


def image_size(cfg: Config) -> Size:
    """Height and width of the images that a config trains on.

    They are what the preprocessor of the student cuts to, else ``image_size`` of the config (width, height), else what
    the training pipeline resizes or crops to, else what is usual for the package.

    Args:
        cfg (Config): Config of a distillation or of a plain model.

    Returns:
        tuple[int, int]: Height and width.
    """
    preprocessor = cfg.model.get('student', cfg.model).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if preprocessor.get('size'):
        return tuple(preprocessor['size'])
    size = cfg.get('image_size') or _of_pipelines((cfg.get('train_dataloader') or {}).get('dataset'))
    if size is None:
        return USUAL_SIZES.get(cfg.get('default_scope'), (224, 224))
    width, height = size
    divisor = preprocessor.get('pad_size_divisor', 1)
    return ceil(height / divisor) * divisor, ceil(width / divisor) * divisor


def _of_pipelines(dataset: Optional[dict]) -> Optional[Size]:
    """Width and height that the last transform gives images; one data set may work on what another gives."""
    if isinstance(dataset, (list, tuple)):
        dataset = dataset[0]
    if dataset is None:
        return None
    inner = dataset.get('dataset') or dataset.get('datasets')
    return _of_pipeline(dataset.get('pipeline') or ()) or _of_pipelines(inner)


def _of_pipeline(steps: Sequence[dict]) -> Optional[Size]:
    for step in reversed(steps):
        branches = step.get('transforms')
        size = _of_pipeline(branches[0]) if branches and isinstance(branches[0], (list, tuple)) else _of_step(step)
        if size is not None:
            return size
    return None


def _of_step(step: dict) -> Optional[Size]:
    size = next((step[key] for key in SIZE_KEYS if step.get(key)), None)
    if isinstance(size, (list, tuple)) and isinstance(size[0], (list, tuple)):
        size = size[-1]  # of several, the largest
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (list, tuple)) or not all(
        isinstance(side, int) for side in size
    ):  # such as a relative crop
        return None
    return (max(size), min(size)) if step.get('keep_ratio') else tuple(size)  # most images are wide


def closest_names(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """The candidates most like ``name``, quoted and joined for the end of an error message."""
    candidates = list(candidates)
    found = difflib.get_close_matches(name, candidates, n=count, cutoff=0.4) or candidates[:count]
    return ', '.join(f"'{candidate}'" for candidate in found)


def refuse_old_keys(keys: Iterable[str], where: str) -> None:
    """Refuse keys that have another name now.

    Args:
        keys (iterable[str]): Keys of a config.
        where (str): What they configure, for the error message.

    Raises:
        ValueError: If one of them has been renamed; it says the new name.
    """
    for key in keys:
        if key in RENAMED_KEYS:
            raise ValueError(f"{where} has no key '{key}': it is called '{RENAMED_KEYS[key]}' now.")
