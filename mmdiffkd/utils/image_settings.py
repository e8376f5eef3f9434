"""Look up the size, channels, normalization and color order of images in a config."""

from math import ceil
from typing import Iterator, Optional, Sequence, Tuple, Union

from mmengine.config import Config

from .config import package_of, type_name

Size = Tuple[int, int]  # height and width
# attributes of OpenMMLab models that hold the image encoder
ENCODERS = ('backbone', 'image_encoder', 'vision_backbone', 'vision_encoder', 'visual_encoder')
# attributes of trackers and semi-supervised models that hold a whole detector
WRAPPED = ('detector', 'student')
# arguments of image encoders that set the number of image channels
CHANNEL_KEYS = ('in_channels', 'in_chans', 'img_channels')
RGB_DATASETS = ('CIFAR10', 'CIFAR100')  # data sets of mmpretrain that contain RGB images and need no loading step
USUAL_SIZES = dict(mmdet=(800, 1344), mmseg=(512, 1024), mmpretrain=(224, 224))
SIZE_KEYS = ('crop_size', 'scale', 'scales', 'img_scale')  # arguments of transforms that set (width, height)


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
