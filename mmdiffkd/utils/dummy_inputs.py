"""Create random training batches for models of mmdet, mmseg and mmpretrain, in the format of their dataloaders."""

import copy
from functools import partial
from typing import Iterator, List, Optional

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, default_collate, pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData

from .config import get_preprocessor_cfg, package_of, set_loader_defaults, type_name
from .image_settings import image_channels, nested_datasets

BOXES = 3  # number of ground truth boxes per image
TEXT = ('person', 'cat', 'dog')  # class names for detectors that read them, such as GroundingDINO
# pipeline for mmpretrain configs without a training set
INFERENCE_ONLY = (dict(type='Resize', scale=224), dict(type='PackInputs'))


def random_items(cfg: Config, size: int, count: int = 2, seed: int = 0, channels: Optional[int] = None) -> List[dict]:
    """Create random items, with images and labels, in the format of a config's training set.

    Args:
        cfg (Config): Config of mmdet, mmseg or mmpretrain.
        size (int): Height and width of the images. With mmpretrain, the config's training pipeline then processes the
            images, and may change their size.
        count (int): Number of items. Re-identification and tracking models always get one item with several images.
            Defaults to 2.
        seed (int): Random seed of the images and labels. It does not affect the augmentations of mmpretrain's
            pipeline. Defaults to 0.
        channels (int, optional): Number of channels of the images. None reads the number from the config. Defaults to
            None.

    Returns:
        list[dict]: Items with ``inputs`` and ``data_samples``.

    Raises:
        ValueError: If the config is not for one of these packages.
    """
    rng = np.random.default_rng(seed)
    scope = package_of(cfg) or DefaultScope.get_current_instance().scope_name
    makers = dict(mmdet=_detection, mmseg=_segmentation, mmpretrain=_classification)
    if scope not in makers:
        raise ValueError(f"Random batches need default_scope to be one of {', '.join(makers)}, not '{scope}'.")
    with DefaultScope.overwrite_default_scope(scope):
        return makers[scope](cfg, partial(random_image, rng, channels=channels or _channels(cfg)), rng, size, count)


def random_batch(cfg: Config, size: int, count: int = 2, seed: int = 0, channels: Optional[int] = None) -> dict:
    """Create a random batch for ``train_step``: :func:`random_items`, collated as the config's dataloader does."""
    items = random_items(cfg, size, count, seed, channels)
    cfg = copy.deepcopy(cfg)
    set_loader_defaults(cfg)
    collate = ((cfg.get('train_dataloader') or {}).get('collate_fn') or {}).get('type')
    return default_collate(items) if type_name(collate) == 'default_collate' else pseudo_collate(items)


def random_image(rng: np.random.Generator, size: int, channels: int = 3) -> np.ndarray:
    """Create a random uint8 image, (size, size, C), of 8x8 squares of a single color each.

    Independent random pixels would not do, because pooling would average them to the same gray.
    """
    coarse = rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((-(-size // 8), -(-size // 8), 1), dtype=np.uint8))[:size, :size]


def _channels(cfg: Config) -> int:
    return image_channels(dict(cfg.model, data_preprocessor=get_preprocessor_cfg(cfg)))[0]


def num_classes_of(model_cfg: dict) -> int:
    """Return the smallest ``num_classes`` in a model's config. Labels below this number are valid in all heads."""
    return min(_values(model_cfg, 'num_classes'), default=1)


def _values(cfg, key: str) -> Iterator[int]:
    if isinstance(cfg, dict):
        if isinstance(cfg.get(key), int) and cfg[key] > 0:
            yield cfg[key]
        for value in cfg.values():
            yield from _values(value, key)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from _values(value, key)


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _detection(cfg: Config, draw, rng, size: int, count: int) -> List[dict]:
    kind = type_name(cfg.model.type)
    if kind == 'SoftTeacher':
        return _semi_supervised(cfg, draw, rng, size, count)
    preprocessor = cfg.model.get('data_preprocessor') or {}
    if 'Track' in type_name(preprocessor.get('type')) and not preprocessor.get('use_det_processor'):
        return _tracking(cfg, draw, rng, size)
    if kind == 'BaseReID':
        return _reid(draw)
    if kind == 'CLRNet':
        return _lanes(cfg, draw, rng, count)
    pairs = [_detection_sample(cfg, draw, rng, size, number) for number in range(count)]
    return [dict(inputs=image, data_samples=sample) for image, sample in pairs]


def _detection_sample(cfg: Config, draw, rng, size: int, number: int):
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=_metainfo(size, number))
    if 'language_model' in cfg.model:
        sample.set_metainfo(dict(text=TEXT, custom_entities=True))
    sample.gt_instances = _instances(cfg, rng, size)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample.proposals = InstanceData(bboxes=_boxes(rng, size, 20), scores=torch.rand(20))
    # the labels for the semantic branch of HTC have 1/8 of the image size
    stride = 8 if (cfg.model.get('roi_head') or {}).get('semantic_head') else 1
    seg = rng.integers(0, _semantic_classes(cfg.model), (1, size // stride, size // stride))
    sample.gt_sem_seg = PixelData(sem_seg=torch.from_numpy(seg))
    return _tensor(draw(size)), sample


def _metainfo(size: int, number: int) -> dict:
    shape = (size, size)
    return dict(
        img_id=number,
        img_path=f'{number}.jpg',
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
        border=[0, size, 0, size],  # needed by CenterNet
        homography_matrix=np.eye(3, dtype=np.float32),
    )


def _boxes(rng, size: int, count: int) -> torch.Tensor:
    """Create boxes (count, 4) whose sides are at least a quarter of the image size."""
    corners = rng.uniform(0, size / 2, (count, 2))
    extents = rng.uniform(size / 4, size / 2, (count, 2))
    return torch.from_numpy(np.hstack([corners, corners + extents])).float()


def _instances(cfg: Config, rng, size: int) -> InstanceData:
    from mmdet.structures.mask import BitmapMasks

    boxes = _boxes(rng, size, BOXES)
    things = next(_values(cfg.model, 'num_things_classes'), None) or num_classes_of(cfg.model)
    if 'language_model' in cfg.model:
        things = min(things, len(TEXT))
    instances = InstanceData(bboxes=boxes, labels=torch.from_numpy(rng.integers(0, things, BOXES)))
    # add masks only if the config loads masks, because some box detectors would use them wrongly
    pipelines = repr(cfg.get('train_dataloader'))
    if "'with_mask': True" not in pipelines and 'Panoptic' not in pipelines:
        return instances
    masks = np.zeros((BOXES, size, size), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    instances.masks = BitmapMasks(masks, size, size)
    return instances


def _semantic_classes(model_cfg: dict) -> int:
    head = model_cfg.get('semantic_head') or (model_cfg.get('roi_head') or {}).get('semantic_head') or {}
    return head.get('num_classes') or next(_values(model_cfg, 'num_stuff_classes'), 1) or 1


def _semi_supervised(cfg: Config, draw, rng, size: int, count: int) -> List[dict]:
    """Create items with the three views that SoftTeacher needs of each image.

    The views are labeled images, unlabeled images for SoftTeacher's teacher, and unlabeled images for its student.
    """
    items = []
    for number in range(count):
        names = ('sup', 'unsup_teacher', 'unsup_student')
        views = {view: _detection_sample(cfg, draw, rng, size, number) for view in names}
        inputs, samples = ({view: pair[i] for view, pair in views.items()} for i in range(2))
        items.append(dict(inputs=inputs, data_samples=samples))
    return items


def _tracking(cfg: Config, draw, rng, size: int) -> List[dict]:
    """Create one item, which is a clip with a key frame and a reference frame."""
    from mmdet.structures import TrackDataSample

    frames = [_detection_sample(cfg, draw, rng, size, number) for number in range(2)]
    for _, sample in frames:
        sample.gt_instances.instances_ids = torch.arange(BOXES)
        sample.gt_instances.map_instances_to_img_idx = torch.full((BOXES,), sample.img_id)
    clip = TrackDataSample(metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1]))
    clip.video_data_samples = [sample for _, sample in frames]
    return [dict(inputs=torch.stack([image for image, _ in frames]), data_samples=clip)]


def _reid(draw, size: int = 256, identities: int = 2, images: int = 2) -> List[dict]:
    """Create one item with two images each of two people, because the triplet loss needs several images per person."""
    from mmdet.structures import ReIDDataSample

    labels = torch.arange(identities).repeat_interleave(images)
    pixels = torch.stack([_tensor(draw(size)[:, : size // 2]) for _ in labels])
    return [dict(inputs=pixels, data_samples=ReIDDataSample().set_gt_label(labels))]


def _lanes(cfg: Config, draw, rng, count: int, height: int = 320, width: int = 800) -> List[dict]:
    """Create images with straight lanes. All images have the same size, because CLRNet's lane priors assume it."""
    from mmdet.registry import TRANSFORMS

    to_array = TRANSFORMS.build(dict(type='LinesToArray', img_height=height, img_width=width))
    pack = TRANSFORMS.build(dict(type='PackLineDetectionInputs'))
    batch = []
    for _ in range(count):
        feet, heads = rng.uniform(0, width, (2, 2))
        lanes = [np.linspace((foot, height - 1), (head, height / 2), 20) for foot, head in zip(feet, heads)]
        mask = np.zeros((height, width), dtype=np.uint8)
        results = dict(img=draw(width)[:height], lines=lanes, org_lines=lanes, gt_seg_map=mask)
        batch.append(pack(to_array(dict(results, org_height=height, org_width=width))))
    return batch


def _segmentation(cfg: Config, draw, rng, size: int, count: int) -> List[dict]:
    from mmseg.structures import SegDataSample

    classes, batch = num_classes_of(cfg.model), []
    for number in range(count):
        sample = SegDataSample(metainfo=_metainfo(size, number))
        labels = np.kron(rng.integers(0, classes, (8, 8)), np.ones((size // 8, size // 8), dtype=np.int64))
        sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels)[None])
        sample.gt_edge_map = PixelData(data=torch.from_numpy(labels % 2)[None])
        sample.gt_depth_map = PixelData(data=torch.from_numpy(rng.random((1, size, size), dtype=np.float32)))
        batch.append(dict(inputs=_tensor(draw(size)), data_samples=sample))
    return batch


def _classification(cfg: Config, draw, rng, size: int, count: int) -> List[dict]:
    from mmpretrain.registry import TRANSFORMS

    datasets = nested_datasets((cfg.get('train_dataloader') or {}).get('dataset'))
    steps = next((dataset['pipeline'] for dataset in datasets if dataset.get('pipeline')), INFERENCE_ONLY)
    steps = [step for step in steps if not type_name(step['type']).startswith('Load')]
    pipeline = Compose([TRANSFORMS.build(step) for step in steps])
    is_multi_label = any('MultiLabel' in str(kind) for kind in _types(cfg.model.get('head') or {}))
    tasks = (cfg.model.get('head') or {}).get('task_heads')
    batch = []
    for number in range(count):
        image, label = draw(size), int(rng.integers(num_classes_of(cfg.model)))
        image = image.squeeze()  # mmpretrain's transforms expect grayscale images without a channel dimension
        if tasks:
            label = {task: int(rng.integers(num_classes_of(head))) for task, head in tasks.items()}
        results = dict(img=image, img_shape=(size, size), ori_shape=(size, size), img_path='', sample_idx=number)
        batch.append(pipeline(dict(results, gt_label=[label] if is_multi_label else label)))
    return batch


def _types(cfg: dict) -> list:
    found = [cfg['type']] if 'type' in cfg else []
    return found + [kind for value in cfg.values() if isinstance(value, dict) for kind in _types(value)]


PRETRAINED = ('pretrained', 'detector_checkpoint', 'teacher_ckpt')


def without_pretrained(cfg) -> None:
    """Remove all settings that load pretrained weights from the config of a model, in place."""
    if isinstance(cfg, dict):
        if 'checkpoint' in str(cfg.get('init_cfg')):
            cfg['init_cfg'] = None
        # timm's wrapper takes a bool
        cfg.update({key: False if isinstance(cfg[key], bool) else None for key in PRETRAINED if key in cfg})
        for value in cfg.values():
            without_pretrained(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            without_pretrained(value)


def fit_to(model_cfg: ConfigDict, size: int) -> ConfigDict:
    """Set the image size of a model's preprocessor, in place, if the preprocessor pads images to a fixed size."""
    preprocessor = model_cfg.get('data_preprocessor') or {}
    if 'size' in preprocessor:
        preprocessor['size'] = (size, size)
    for augment in preprocessor.get('batch_augments') or ():
        if 'size' in augment:
            augment['size'] = (size, size)
    return model_cfg
