"""Find and read configs from installed packages, files and dicts."""

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
# old key: new key
RENAMED_KEYS = dict(
    backprop_steps='num_grad_steps',
    distance='loss_kd',
    floor='min_score',
    inherit='init_from_teacher',
    schedule='scheduler',
)


def resolve_config(source: ConfigSource) -> Config:
    """Read a config by name, from a file, or from a dict.

    ``pkg`` is the name that Python imports, so the original OpenMMLab packages and their maintained forks work.

    Args:
        source (str, Path or dict): ``'mmdet::retinanet/retinanet_r101_fpn_2x_coco.py'``, a local file, or a dict with
            a whole config or only a model.

    Returns:
        Config: A config with the key ``model``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the config has no model, or ``source`` is not a str, Path or dict.
    """
    if isinstance(source, dict):
        cfg = Config(dict(source) if 'model' in source else dict(model=dict(source)))
    elif isinstance(source, (str, Path)):
        cfg = Config.fromfile(_config_file(str(source)))
    else:
        raise ValueError(f'A config must be a path, pkg::path or a dict, not {type(source).__name__}.')
    if not isinstance(cfg.get('model'), dict) or 'type' not in cfg.model:
        raise ValueError(f"The config ({_name(source)}) has no model: it needs a 'model' dict with a 'type'.")
    return cfg


def read_config(config: Union[str, Path, Config], cfg_options: Optional[dict] = None) -> Config:
    """Read a config and apply overrides, as the tools do.

    Args:
        config (str, Path or Config): Path of the config, ``pkg::path``, or a loaded config, which is not modified.
        cfg_options (dict, optional): Overrides, as on the command line.

    Returns:
        Config: A config with the key ``model``.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If the config does not exist.
        ValueError: If the config is not valid Python or has no model.
    """
    try:
        cfg = copy.deepcopy(config) if isinstance(config, Config) else resolve_config(config)
    except SyntaxError as error:
        raise ValueError(
            f"The config '{config}', or a config that it inherits, is not valid Python: {error}."
        ) from error
    cfg.merge_from_dict(cfg_options or {})
    return cfg


def get_model_cfg(cfg: Config) -> ConfigDict:
    """Return the model of a config with its preprocessor and scope, so that it builds under any default scope."""
    model = copy.deepcopy(ConfigDict(cfg.model))  # some models modify their config while they are built
    if model.get('_scope_') is None and cfg.get('default_scope') is not None:
        model['_scope_'] = cfg.default_scope
    return with_preprocessor(model, cfg.get('data_preprocessor'))


def with_preprocessor(model: ConfigDict, preprocessor: Optional[dict]) -> ConfigDict:
    """Add the top-level preprocessor to a model without its own, as the Runner does. Modifies ``model``."""
    if model.get('data_preprocessor') is None and preprocessor is not None:
        model['data_preprocessor'] = copy.deepcopy(preprocessor)
    return model


def get_preprocessor_cfg(cfg: Config) -> Optional[dict]:
    """Return the data preprocessor of a config: the model's own, or the top-level one, as in mmpretrain."""
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')


def get_custom_imports(cfg: Config) -> List[str]:
    """Return the modules in ``custom_imports`` of a config, except modules of mmdiffkd."""
    names = (cfg.get('custom_imports') or {}).get('imports') or []
    return [name for name in ([names] if isinstance(names, str) else names) if name.split('.')[0] != 'mmdiffkd']


def image_channels(preprocessor: Optional[dict]) -> int:
    """Return the number of image channels that a data preprocessor expects: the length of its mean, usually 3."""
    return len((preprocessor or {}).get('mean') or 'RGB')


def zoo_checkpoint(source: ConfigSource) -> str:
    """Look up the weights of a config in the model index of its package.

    Args:
        source (str): ``pkg::path`` of the config.

    Returns:
        str: URL of the weights.

    Raises:
        ValueError: If ``source`` is not ``pkg::path``, or the model index lists no weights for the config.
    """
    if not isinstance(source, str) or '::' not in source:
        raise ValueError(
            f"checkpoint='zoo' needs a config of an installed package such as 'mmdet::retinanet/...', not "
            f'{_name(source)}; give the path or URL of the weights instead.'
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
SIZE_KEYS = ('crop_size', 'scale', 'scales', 'img_scale')  # arguments of transforms that give (width, height)


def image_size(cfg: Config) -> Size:
    """Return the height and width of the images that a config trains on.

    The size is the first of these that is set: ``size`` of the student's preprocessor, ``image_size`` of the config
    (width, height), the last resize or crop of the training pipeline, the usual size of the package.

    Args:
        cfg (Config): Config of a distillation or of a plain model.

    Returns:
        tuple[int, int]: Height and width.
    """
    preprocessor = cfg.model.get('student', cfg.model).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if preprocessor.get('size'):
        return tuple(preprocessor['size'])
    size = cfg.get('image_size') or _dataset_size((cfg.get('train_dataloader') or {}).get('dataset'))
    if size is None:
        return USUAL_SIZES.get(cfg.get('default_scope'), (224, 224))
    width, height = size
    divisor = preprocessor.get('pad_size_divisor', 1)
    return ceil(height / divisor) * divisor, ceil(width / divisor) * divisor


def _dataset_size(dataset: Optional[dict]) -> Optional[Size]:
    """Return the width and height of the images of a dataset, from its pipeline or that of the dataset it wraps."""
    if isinstance(dataset, (list, tuple)):
        dataset = dataset[0]
    if dataset is None:
        return None
    inner = dataset.get('dataset') or dataset.get('datasets')
    return _pipeline_size(dataset.get('pipeline') or ()) or _dataset_size(inner)


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
        return None  # for example, relative crops have fractions
    # keep_ratio accepts both orders; assume landscape images
    return (max(size), min(size)) if step.get('keep_ratio') else tuple(size)


def closest_names(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates closest to ``name``, quoted and joined for an error message."""
    candidates = list(candidates)
    found = difflib.get_close_matches(name, candidates, n=count, cutoff=0.4) or candidates[:count]
    return ', '.join(f"'{candidate}'" for candidate in found)


def refuse_old_keys(keys: Iterable[str], where: str) -> None:
    """Raise an error if a config uses the old name of a renamed key.

    Args:
        keys (iterable[str]): Keys of a config.
        where (str): Object that the keys configure, for the error message.

    Raises:
        ValueError: If a key has been renamed; the message gives the new name.
    """
    for key in keys:
        if key in RENAMED_KEYS:
            raise ValueError(f"{where} has no key '{key}': the key is now called '{RENAMED_KEYS[key]}'.")
