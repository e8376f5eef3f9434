"""What is distilled where a config does not say."""

from typing import Dict, Optional

from torch import nn

from mmdiffkd.utils import skeleton

from .passes import ENCODERS

DETECTION_PARTS = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head', 'track_head')
# the last layer that returns maps of the batch: MLP-Mixer turns its tokens round after it, TridentNet has a batch for
# each of its branches while it trains
LAST_MAPS = dict(MlpMixer='ln1', TridentResNet='layer2')
# the paper's width of the autoencoder on classifiers' features
CLASSIFIER_LATENT_CHANNELS = 1024


def default_distill(student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
    """The pairs of a student and a teacher of the same task, as the paper has them.

    - Detectors: neck to neck, or backbone to backbone where a model has no neck.
    - Segmentors: logits before they are resized, by DIST; backbone to backbone where a model has none or both know
      other classes.
    - Classifiers: the last feature map through an autoencoder, unless the student's is frozen, and the logits by KL
      divergence where both know as many classes.
    - Other models: what encodes the images.

    Args:
        student (nn.Module): The student.
        student_cfg (dict): Its config.
        teacher_cfg (dict): Config of the teacher.

    Returns:
        dict[str, dict]: A ``distill`` to be completed by :func:`read_pairs`.

    Raises:
        ValueError: If the two have different tasks, or nothing that can be distilled.
    """
    tasks = [_task(cfg) for cfg in (student_cfg, teacher_cfg)]
    features = [_features(cfg) for cfg in (student_cfg, teacher_cfg)]
    if tasks[0] != tasks[1] or None in features:
        raise ValueError(
            f'There is no default tap for the student {student_cfg["type"]} and the teacher {teacher_cfg["type"]}; '
            "name one: distill=dict(feat=dict(student='backbone', teacher='backbone'))."
        )
    if tasks[0] == 'detection':
        return dict(fpn=_pair(features))
    logits = [None, None]
    if tasks[0] in LOGITS and _num_classes(student_cfg) == _num_classes(teacher_cfg) is not None:
        logits = [LOGITS[tasks[0]](student, student_cfg), LOGITS[tasks[0]](skeleton(teacher_cfg), teacher_cfg)]
    if tasks[0] == 'segmentation':
        return dict(feat=_pair(features)) if None in logits else dict(logits=_pair(logits, distance='DISTLoss'))

    pairs = {}
    if any(parameter.requires_grad for parameter in student.get_submodule(features[0]).parameters()):
        latent_channels = CLASSIFIER_LATENT_CHANNELS if tasks[0] == 'classification' else None
        pairs['feat'] = _pair(features, distance='MSELoss', latent_channels=latent_channels)
    if None not in logits:
        parts = dict(denoiser=dict(type='mmdiffkd.MLPDenoiser'), noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter'))
        pairs['logits'] = _pair(logits, distance='KLDivergence', **parts)
    if not pairs:
        raise ValueError(
            f'The {features[0]} of the student {student_cfg["type"]} is frozen, and there are no logits to compare: '
            'there is nothing that distillation could train.'
        )
    return pairs


def _pair(taps, distance: Optional[str] = None, **neck) -> dict:
    if distance is not None:
        neck['distance'] = dict(type=f'mmdiffkd.{distance}')
    return dict(student=taps[0], teacher=taps[1], neck=neck)


def _task(cfg: dict) -> str:
    if cfg.get('decode_head'):
        return 'segmentation'
    if any(cfg.get(part) is not None for part in (*DETECTION_PARTS, 'detector')):
        return 'detection'
    return 'classification' if cfg['type'].split('.')[-1] == 'ImageClassifier' else 'other'


def _features(cfg: dict) -> Optional[str]:
    """The module whose features are compared; None if it is not where upstream keeps it."""
    if isinstance(cfg.get('detector'), dict):
        inner = _features(cfg['detector'])
        is_semi_supervised = 'semi_train_cfg' in cfg  # a detector twice, as student and teacher
        return inner and f'{"student" if is_semi_supervised else "detector"}.{inner}'
    if cfg.get('neck') and _task(cfg) == 'detection':
        return 'neck'
    for name in ENCODERS:
        if cfg.get(name):
            is_list = isinstance(cfg[name], (list, tuple))  # the encoder and what follows it
            path, encoder = (f'{name}.0', cfg[name][0]) if is_list else (name, cfg[name])
            last = LAST_MAPS.get(str(encoder.get('type')).split('.')[-1])
            return path if last is None else f'{path}.{last}'
    return None


def _num_classes(cfg: dict) -> Optional[int]:
    head = cfg.get('decode_head') or cfg.get('head') or {}
    return (head[-1] if isinstance(head, (list, tuple)) else head).get('num_classes')


def _pixel_logits(model: nn.Module, cfg: dict) -> Optional[str]:
    """A segmentor's layer of logits; of a cascade, the last stage's."""
    head = cfg['decode_head']
    path = f'decode_head.{len(head) - 1}.conv_seg' if isinstance(head, (list, tuple)) else 'decode_head.conv_seg'
    return path if path in dict(model.named_modules()) else None


def _class_logits(model: nn.Module, cfg: dict) -> Optional[str]:
    """A classifier's layer of logits: the first linear one of its head with as many outputs as there are classes."""
    for name, module in model.named_modules():
        if name.startswith('head.') and getattr(module, 'out_features', None) == _num_classes(cfg):
            return name
    return None


LOGITS = dict(segmentation=_pixel_logits, classification=_class_logits)
