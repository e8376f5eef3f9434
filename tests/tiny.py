"""Real mmdet detectors with few channels, their checkpoints and batches."""

import copy
from pathlib import Path

import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from mmdiffkd.utils import get_model_cfg, resolve_config

ROOT = Path(__file__).parent.parent
RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
FPN = dict(student='neck', teacher='neck')
# two levels and two denoising steps, for tests that need a whole run but not the default pairs
LIGHT = dict(fpn=dict(FPN, levels=[0, 1], neck=dict(scheduler=dict(num_inference_steps=2))))
# Image height and width. P7 is a single pixel, so BatchNorm needs at least two images for its statistics.
SIZE = 128


def detector(config=RETINANET, base_channels=8, **changes):
    """Return the config of a detector with a thin ResNet-18 and FPN, trained from scratch.

    Args:
        config (str): ``pkg::path`` of the config.
        base_channels (int): Channels of the first stage.
        **changes: Model settings to override, with dotted keys.
    """
    cfg = resolve_config(config)
    widths = [base_channels * 2**i for i in range(4)]
    cfg.merge_from_dict(
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': base_channels,
            'model.backbone.stem_channels': base_channels,
            'model.backbone.frozen_stages': -1,
            'model.backbone.norm_eval': False,
            'model.backbone.init_cfg': None,
            'model.neck.in_channels': widths,
            'model.neck.out_channels': 16,
        }
    )
    head = 'roi_head' if config == FASTER_RCNN else 'bbox_head'
    if head == 'bbox_head':
        cfg.merge_from_dict(
            {
                'model.bbox_head.in_channels': 16,
                'model.bbox_head.feat_channels': 16,
                'model.test_cfg.score_thr': 0.0,  # keep detections of a barely trained model
            }
        )
    else:
        cfg.merge_from_dict(
            {
                'model.rpn_head.in_channels': 16,
                'model.rpn_head.feat_channels': 16,
                'model.roi_head.bbox_roi_extractor.out_channels': 16,
                'model.roi_head.bbox_head.in_channels': 16,
                'model.roi_head.bbox_head.fc_out_channels': 16,
                'model.train_cfg.rcnn.sampler.num': 16,
                'model.train_cfg.rpn_proposal.max_per_img': 32,
            }
        )
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    return get_model_cfg(cfg)


def write_checkpoint(model_cfg, path, seed=0):
    """Write seeded weights of a model and return their path."""
    torch.manual_seed(seed)
    state = MODELS.build(copy.deepcopy(model_cfg)).state_dict()
    for value in filter(torch.is_floating_point, state.values()):
        value.nan_to_num_(0, 0, 0)  # DINO leaves some weights uninitialized until init_weights
    torch.save(dict(state_dict=state, meta=dict()), path)
    return str(path)


def distiller_cfg(folder, student=None, teacher=None, **options):
    """Return the config of a distiller, and write the teacher's checkpoint to ``folder``."""
    student, teacher = student or detector(), teacher or detector(base_channels=16)
    checkpoint = write_checkpoint(teacher, folder / 'teacher.pth', seed=1)
    cfg = dict(type='mmdiffkd.DiffKDDistiller', student=student, teacher=dict(config=teacher, checkpoint=checkpoint))
    return ConfigDict({**cfg, **options})


def build(cfg, seed=0):
    """Build a distiller and initialize it as the Runner does before training."""
    torch.manual_seed(seed)
    model = MODELS.build(cfg)
    model.init_weights()
    return model.train()


def batch(model, count=2, size=SIZE, num_classes=80):
    """Return preprocessed images and data samples with random boxes, as arguments of ``loss``."""
    data = demo_mm_inputs(count, [[3, size, size]] * count, num_items=[3] * count, num_classes=num_classes)
    data = model.data_preprocessor(data, training=True)
    return data['inputs'], data['data_samples']


def unformatted(cfg):
    """Return a config that is not formatted: mmengine formats configs often, which takes longer than a tiny run."""
    return Config(cfg.to_dict(), format_python_code=False)


def run_cfg(model_cfg, data_root, work_dir, **options):
    """Return the config of a real run on the ``shapes`` fixture, with one image size and no workers.

    Args:
        model_cfg (dict): Config of the model.
        data_root (Path): Folder of the data set.
        work_dir (Path): Work dir of the run.
        **options: Settings to override, with ``__`` for dots.
    """
    cfg = unformatted(Config.fromfile(ROOT / 'configs' / '_base_' / 'shapes.py'))
    cfg.model = model_cfg
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{data_root}/'
        loader.dataset.pop('metainfo')  # the detectors have COCO's 80 classes
        for transform in loader.dataset.pipeline:
            if transform.type == 'Resize':
                transform.scale = (SIZE, SIZE)  # takes precedence over scale_factor
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = f'{data_root}/annotations/val.json'
    cfg.merge_from_dict({key.replace('__', '.'): value for key, value in options.items()})
    return cfg
