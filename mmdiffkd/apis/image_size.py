from math import ceil
from typing import Optional, Sequence, Tuple

from mmengine.config import Config

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
