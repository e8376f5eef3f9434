import copy
from typing import Optional, Tuple

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdiffkd.utils import with_preprocessor


def build_distiller(config: str, cfg_options: Optional[dict] = None) -> Tuple[Config, nn.Module]:
    """Build the distiller of a config to look at it; no weights are loaded.

    Args:
        config (str): Path of the config.
        cfg_options (dict, optional): Overrides, as on the command line.

    Returns:
        tuple[Config, Module]: The config and its model.

    Raises:
        ValueError: If nothing is distilled.
    """
    cfg = Config.fromfile(config)
    if cfg_options is not None:
        cfg.merge_from_dict(cfg_options)
    if 'student' not in cfg.model:
        raise ValueError(f'{config} distils nothing: its model is a plain {cfg.model.type}.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = build_model(cfg, cfg.model)
    if model.diffkd_teacher is None:
        raise ValueError(f'{config} distils nothing: {model.deferred_error or "it has no teacher"}')
    return cfg, model


def build_model(cfg: Config, model_cfg: ConfigDict) -> nn.Module:
    """Build a model as the Runner does, with the config's top-level preprocessor where it has none of its own."""
    model_cfg = copy.deepcopy(model_cfg)  # some models change their config while they are built
    return MODELS.build(with_preprocessor(model_cfg, cfg.get('data_preprocessor')))
