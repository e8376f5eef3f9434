"""Upstream's models as they are, but for what takes a download or large images."""

from mmengine.config import ConfigDict

PRETRAINED = ('pretrained', 'detector_checkpoint', 'teacher_ckpt')


def without_pretrained(cfg) -> None:
    """Take pretrained weights out of the config of a model, in place."""
    if isinstance(cfg, dict):
        if 'checkpoint' in str(cfg.get('init_cfg')):
            cfg['init_cfg'] = None
        cfg.update({key: None for key in PRETRAINED if key in cfg})
        for value in cfg.values():
            without_pretrained(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            without_pretrained(value)


def fit_to(model_cfg: ConfigDict, size: int) -> ConfigDict:
    """Tell a preprocessor that pads to one size that images have another, in place; the layers stay as they are."""
    preprocessor = model_cfg.get('data_preprocessor') or {}
    if 'size' in preprocessor:
        preprocessor['size'] = (size, size)
    for augment in preprocessor.get('batch_augments') or ():
        if 'size' in augment:
            augment['size'] = (size, size)
    return model_cfg
