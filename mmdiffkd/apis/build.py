"""Build models of configs."""

import copy
from typing import Optional, Tuple, Union

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdiffkd.models.distillers.classes import dataset_classes
from mmdiffkd.utils import read_config
from mmdiffkd.utils.config import package_of, type_name, with_preprocessor


def build_distiller(config: Union[str, Config], cfg_options: Optional[dict] = None) -> Tuple[Config, nn.Module]:
    """Build the distiller of a config for inspection, without loading weights.

    Args:
        config (str or Config): Path of the config, or a loaded config.
        cfg_options (dict, optional): Overrides, as on the command line.

    Returns:
        tuple[Config, Module]: The config and the distiller.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If the config does not exist.
        ValueError: If the config cannot be read, has no distiller, or has no teacher that can be built.
    """
    name = 'The config' if isinstance(config, Config) else config
    cfg = read_config(config, cfg_options)
    if not {'student', 'teacher', 'distill'} & set(cfg.model):
        raise ValueError(f'{name} is not a distillation config: its model is a plain {type_name(cfg.model.type)}.')
    init_default_scope(package_of(cfg) or 'mmengine')
    model = build_model(cfg, cfg.model)
    if model.diffkd_teacher is None:
        raise ValueError(f'{name} cannot be distilled: {model.deferred_error or "it has no teacher"}')
    return cfg, model


def build_model(cfg: Config, model_cfg: ConfigDict) -> nn.Module:
    """Build a model as the Runner does: with the top-level preprocessor, unless the model has its own.

    A distiller also gets the names of the classes. During training, it finds them in the Runner's config.
    """
    model_cfg = copy.deepcopy(model_cfg)  # some models modify their config while they are built
    classes = dataset_classes(cfg) if 'student' in model_cfg else None
    if classes is not None and model_cfg.get('metainfo') is None:
        model_cfg.metainfo = dict(classes=list(classes))
    return MODELS.build(with_preprocessor(model_cfg, cfg.get('data_preprocessor')))
