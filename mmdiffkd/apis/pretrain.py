"""Pre-train the backbone and neck of a student on images without labels."""

import os
import time
from math import ceil
from pathlib import Path
from typing import Annotated, Dict, List, Optional, Sequence, Union

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner

from mmdiffkd.engine.hooks.pretrained_weights_hook import PARTS, WEIGHTS
from mmdiffkd.models.distillers.input_renormalizer import Preprocessor
from mmdiffkd.models.distillers.pairs import Pair, read_pairs
from mmdiffkd.models.presets.base import ENCODER, find_features, find_task
from mmdiffkd.utils import read_config
from mmdiffkd.utils.check_config import Limits, Positive, check_value
from mmdiffkd.utils.config import (
    get_custom_imports,
    get_model_cfg,
    get_preprocessor_cfg,
    get_teacher_cfg,
    package_of,
    resolve_config,
    type_name,
    with_named_types,
)
from mmdiffkd.utils.image_settings import image_channels, image_size, loaded_order, pipeline_normalization
from mmdiffkd.utils.meta_device import build_for_inspection

from .distill import Source, distillation_config
from .parallel import available_cores

CONFIG = 'pretrain.py'
LARGEST_SIZE = 224  # pixels; larger images take longer and hardly improve the weights
SIZE_DIVISOR = 32  # stride of the last level of most backbones
LR, LR_BATCH_SIZE = 1e-3, 64
WARMUP = 0.05  # fraction of the training
MAX_WORKERS = 8
CHECKPOINTS = 20  # number of checkpoints per run


def pretrain(
    student_config: Source,
    teacher_config: Source,
    teacher_checkpoint: str = 'zoo',
    images: Union[str, Path, Sequence[Union[str, Path]]] = (),
    work_dir: str = 'work_dirs/pretrain',
    resume: bool = False,
    **settings,
) -> dict:
    """Pre-train the backbone and neck of a student by distillation, on folders of images without labels.

    Args:
        student_config (str, Path or Config): Config of a detector, segmentor or classifier: ``pkg::path``, a file, or a
            loaded config.
        teacher_config (str, Path or Config): Config of the teacher.
        teacher_checkpoint (str): Weights of the teacher; see :func:`distill`. Defaults to ``'zoo'``.
        images (str, Path or list): Folders with images, in subfolders of any depth.
        work_dir (str): Folder for logs, checkpoints, the config ``pretrain.py`` and the weights ``pretrained.pth``.
            Defaults to ``'work_dirs/pretrain'``.
        resume (bool): Resume from the latest checkpoint in ``work_dir``. Defaults to False.
        **settings: Other arguments of :func:`pretrain_config`.

    Returns:
        dict: Absolute paths:

        * ``config``, ``checkpoint``: the config and the last checkpoint of the run.
        * ``weights``: the pre-trained weights, with the keys ``backbone.*`` and, if the neck was trained, ``neck.*``.
          The end of the log shows the lines that load them in the student's config.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: See :func:`pretrain_config`.
    """
    cfg = pretrain_config(student_config, teacher_config, teacher_checkpoint, images, work_dir, **settings)
    cfg.resume = resume
    # use a new name: mmengine caches visualizers by name, so a second run would write to the first run's folder
    cfg.visualizer.name = f'{work_dir}_{time.time_ns()}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return dict(
        config=str(Path(runner.work_dir, CONFIG)),
        checkpoint=runner.message_hub.get_info('last_ckpt'),
        weights=str(Path(runner.work_dir, WEIGHTS)),
    )


def pretrain_config(
    student_config: Source,
    teacher_config: Source,
    teacher_checkpoint: str = 'zoo',
    images: Union[str, Path, Sequence[Union[str, Path]]] = (),
    work_dir: str = 'work_dirs/pretrain',
    preset: str = 'pkd',
    pairs: Optional[dict] = None,
    epochs: int = 100,
    batch_size: int = 64,
    lr: Optional[float] = None,
    size: Optional[int] = None,
    cfg_options: Optional[dict] = None,
) -> Config:
    """Return a config for pre-training, which any Runner can train.

    The student is the backbone of ``student_config``, and its neck if a pair compares it. Stages and normalization
    layers that the config freezes are trained as well. The training images are random crops of at least a quarter of an
    image, resized and randomly flipped. AdamW trains with a linear warm-up over 5% of the training, then a cosine
    decay to 0.

    Args:
        student_config, teacher_config, teacher_checkpoint, images, work_dir: See :func:`pretrain`.
        preset (str): Method, which must compare features of backbones or necks. Its pairs in the heads are left out.
            Defaults to ``'pkd'``.
        pairs (dict, optional): Features to compare, in the format of ``distill`` in configs. Defaults to the pairs of
            the preset. If student and teacher have different tasks: all levels that their backbones share.
        epochs (int): Number of epochs. Defaults to 100.
        batch_size (int): Images per GPU, reduced if there are fewer images. Defaults to 64.
        lr (float, optional): Largest learning rate. Defaults to 0.001 for 64 images, scaled with the square root of the
            batch size.
        size (int, optional): Height and width of the images in pixels. Defaults to the ``img_size`` of the backbone if
            it is set, otherwise the shorter side of the config's images, at most 224. It is rounded up to a multiple of
            32 and of the size divisor of the preprocessor.
        cfg_options (dict, optional): Overrides, as on the command line: ``{'optim_wrapper.optimizer.type': 'SGD'}``.

    Returns:
        Config: The config.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If a config, a package, the weights or a folder do not exist.
        ValueError: If there are no images, the student has no backbone, or the pairs do not fit the models.
    """
    for key, value, hint in (
        ('epochs', epochs, Annotated[int, Limits(1)]),
        ('batch_size', batch_size, Annotated[int, Limits(2)]),
        ('lr', lr, Optional[Positive]),
        ('size', size, Optional[Annotated[int, Limits(1)]]),
    ):
        check_value(key, value, hint)
    folders = [str(folder) for folder in ([images] if isinstance(images, (str, Path)) else images)]
    if not folders:
        raise ValueError('images is empty: name at least one folder with images.')
    cfg = read_config(student_config)
    if 'student' in cfg.model:
        raise ValueError('student_config is a distillation config; give the config of the plain student.')
    init_default_scope(package_of(cfg) or 'mmengine')
    cfg.model = ConfigDict(with_named_types(cfg.model.to_dict()))
    model_cfg = get_model_cfg(cfg)
    if not isinstance(model_cfg.get('backbone'), dict):
        raise ValueError(
            f'The student {type_name(model_cfg.type)} has no backbone of its own to pre-train; give the config of a '
            'plain detector, segmentor or classifier.'
        )
    teacher_cfg = teacher_config if isinstance(teacher_config, Config) else resolve_config(teacher_config)
    pairs = _choose_pairs(model_cfg, get_teacher_cfg(teacher_cfg), preset, pairs)
    encoder = _encoder(cfg, model_cfg, pairs)
    dataset = dict(type='mmdiffkd.ImageFolders', folders=folders)
    count = len(DATASETS.build(dataset))  # a folder without images is refused before the teacher is loaded
    share = count // int(os.environ.get('WORLD_SIZE', 1))  # images of a rank
    if share < 2:
        raise ValueError(f'The folders contain {count} images, which are too few: each process needs 2 or more images.')
    batch_size = min(batch_size, share)
    steps = share // batch_size
    size = _image_size(cfg, encoder) if size is None else size
    divisor = encoder['data_preprocessor'].get('pad_size_divisor', 1)
    dataset['pipeline'] = [
        dict(type='mmdiffkd.LoadImage', color_type='grayscale' if image_channels(encoder)[0] == 1 else 'color'),
        dict(type='mmdiffkd.RandomResizedCrop', scale=_rounded_up(_rounded_up(size, SIZE_DIVISOR), divisor)),
        dict(type='mmengine.RandomFlip', prob=0.5),
        dict(type='mmdiffkd.PackImage'),
    ]
    lr = lr or float(f'{LR * (batch_size / LR_BATCH_SIZE) ** 0.5:.2g}')
    workers = min(MAX_WORKERS, available_cores()) if available_cores() > 1 else 0
    run = Config(
        dict(
            default_scope=package_of(cfg) or 'mmengine',
            custom_imports=dict(imports=get_custom_imports(cfg), allow_failed_imports=False),
            model=encoder,
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=workers,
                persistent_workers=workers > 0,
                drop_last=True,  # a last batch of one image has no batch statistics
                sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate'),
                dataset=dataset,
            ),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='AdamW', lr=lr, weight_decay=0.05),
                paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
            ),
            param_scheduler=_schedulers(epochs, steps),
            default_hooks=dict(checkpoint=dict(interval=ceil(epochs / CHECKPOINTS), max_keep_ckpts=1)),
            custom_hooks=[dict(type='mmdiffkd.PretrainedWeightsHook')],
            env_cfg=dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0)),
            visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
            randomness=dict(seed=0),
            work_dir=str(work_dir),
        ),
        cfg_text='generated',  # without a text, mmengine would read it from the file, which does not exist
        filename=str(Path(work_dir, CONFIG)),  # the Runner writes the config to this file
    )
    run = distillation_config(run, teacher_config, teacher_checkpoint, pairs, preset, None)
    run.model.task_loss = False
    # a segmentor as teacher would pad all images to the size of its own training
    if (get_preprocessor_cfg(teacher_cfg) or {}).get('size'):
        run.model.teacher.data_preprocessor = dict(size=None)
    run.merge_from_dict(cfg_options or {})
    return run


def _schedulers(epochs: int, steps: int) -> List[dict]:
    """Return the schedulers of the learning rate.

    Args:
        epochs (int): Number of epochs.
        steps (int): Iterations per epoch.

    Returns:
        list[dict]: Linear warm-up of at least one iteration, then cosine decay. The list is empty for runs of one or
        two iterations.
    """
    if epochs * steps < 3:
        return []
    warmup = max(WARMUP * epochs, 1.5 / steps)  # in epochs; mmengine rounds down to iterations
    cosine = dict(type='CosineAnnealingLR', begin=warmup, end=epochs, T_max=epochs - warmup, convert_to_iter_based=True)
    return [dict(type='LinearLR', start_factor=0.01, begin=0, end=warmup, convert_to_iter_based=True), cosine]


def _choose_pairs(student: ConfigDict, teacher: ConfigDict, preset: str, pairs: Optional[dict]) -> Dict[str, dict]:
    """Return the pairs to distill, with all settings. Pairs with taps in the student's heads are left out."""
    if pairs is None and find_task(teacher) not in (find_task(student), ENCODER):  # presets have pairs for encoders
        encoders = [
            find_features({key: value for key, value in cfg.items() if key != 'neck'}) for cfg in (student, teacher)
        ]
        if None not in encoders:
            pairs = dict(feat=dict(student=encoders[0], teacher=encoders[1]))
    chosen = read_pairs(pairs, build_for_inspection(student), student, teacher, preset)
    fitting = {name: pair for name, pair in chosen.items() if all(map(_part_of, pair.student_taps))}
    others = {name: pair.student_taps[0] for name, pair in chosen.items() if name not in fitting}
    if others and (pairs is not None or not fitting):
        name, tap = next(iter(others.items()))
        raise ValueError(
            f'Pre-training has no labels and trains only {" and ".join(PARTS)}, but '
            f"{f'distill.{name}' if pairs is not None else f'preset={preset!r}'} compares the student's '{tap}'; "
            "compare features, such as with preset='pkd'."
        )
    if others:
        print_log(f'Pairs in the heads are left out: {", ".join(others)}.', logger='current')
    return {name: _as_dict(pair) for name, pair in fitting.items()}


def _part_of(tap: str) -> Optional[str]:
    """Return the part that contains a tap, ``'backbone'`` or ``'neck'``; None for a tap in the heads."""
    first = tap.split('.')[0]
    return first if first in PARTS else None


def _as_dict(pair: Pair) -> dict:
    return {key: value for key, value in pair._asdict().items() if value is not None}


def _encoder(cfg: Config, model_cfg: ConfigDict, pairs: Dict[str, dict]) -> dict:
    """Return the config of the student: the parts of the model that the pairs compare."""
    backbone = model_cfg.backbone.to_dict()
    # segmentors pass this argument to their backbone
    if model_cfg.get('pretrained') and not backbone.get('pretrained'):
        backbone['pretrained'] = model_cfg.pretrained
    encoder = dict(type='mmdiffkd.ImageEncoder', _scope_=model_cfg.get('_scope_'), backbone=backbone)
    taps = [pair['student'] for pair in pairs.values()]
    taps = [tap for entry in taps for tap in ([entry] if isinstance(entry, str) else entry)]
    if 'neck' in map(_part_of, taps):
        encoder['neck'] = model_cfg.neck.to_dict() if isinstance(model_cfg.neck, dict) else list(model_cfg.neck)
    encoder['data_preprocessor'] = _preprocessor(cfg, model_cfg)
    return encoder


def _preprocessor(cfg: Config, model_cfg: ConfigDict) -> dict:
    """Return the config of a preprocessor that converts BGR or gray images to the inputs of the student."""
    with_scope = dict(model_cfg.get('data_preprocessor') or {})
    if with_scope.get('type'):
        with_scope.setdefault('_scope_', model_cfg.get('_scope_'))
    preprocessor = Preprocessor(with_scope)
    channels = image_channels(model_cfg)[0]
    if channels not in (1, 3):
        raise ValueError(
            f'The student takes images of {channels} channels, but image files are read as color or gray images, with '
            '3 channels or 1.'
        )
    pixel_map = preprocessor.pixel_map(channels)
    normalization = pipeline_normalization(cfg)
    if normalization and pixel_map is not None and preprocessor.is_raw(pixel_map):
        preprocessor, pixel_map = Preprocessor(normalization), Preprocessor(normalization).pixel_map(channels)
    result = dict(type='mmengine.ImgDataPreprocessor')
    if pixel_map is None:
        raise ValueError(
            f"The student's data_preprocessor {type_name(with_scope.get('type'))} does not take images of {channels} "
            'channels; pre-training needs one that normalizes color or gray images.'
        )
    weight = pixel_map.weight.diagonal() if channels == 1 else pixel_map.weight.abs().amax(1)
    swaps = channels == 3 and bool(pixel_map.weight[0, 0] == 0)
    mean, std = (-pixel_map.bias / weight).tolist(), (1 / weight).tolist()
    if any(mean) or set(std) != {1.0}:
        result.update(mean=[round(value, 4) for value in mean], std=[round(value, 4) for value in std])
    if swaps != (loaded_order(cfg) == 'RGB'):
        result['bgr_to_rgb'] = True
    if preprocessor.pad_divisor > 1:
        result['pad_size_divisor'] = preprocessor.pad_divisor
    return result


def _image_size(cfg: Config, encoder: dict) -> int:
    """Return the default height and width of the images."""
    own = encoder['backbone'].get('img_size')
    if own is not None:
        return max(own) if isinstance(own, (list, tuple)) else own
    return min(LARGEST_SIZE, *image_size(cfg))


def _rounded_up(value: int, divisor: int) -> int:
    return ceil(value / divisor) * divisor
