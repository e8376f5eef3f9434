"""What is distilled where a config does not say."""

from typing import Dict, Optional

from .probe import has_module

DETECTION_PARTS = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head')


def default_distill(student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
    """The pairs of a student and a teacher of the same task, as the paper has them.

    - Detectors: neck to neck, or backbone to backbone where a model has no neck.
    - Segmentors: logits before they are resized, by DIST.
    - Classifiers: the last feature map, and the logits by KL divergence where both know as many classes.

    Args:
        student_cfg (dict): Config of the student.
        teacher_cfg (dict): Config of the teacher.

    Returns:
        dict[str, dict]: A ``distill`` to be completed by :func:`read_pairs`.

    Raises:
        ValueError: If the two have different tasks, or one that has no default.
    """
    tasks = [_task(cfg) for cfg in (student_cfg, teacher_cfg)]
    if tasks[0] is None or tasks[0] != tasks[1]:
        raise ValueError(
            f'There is no default tap for the student {student_cfg["type"]} and the teacher {teacher_cfg["type"]}; '
            "name one: distill=dict(feat=dict(student='backbone', teacher='backbone'))."
        )
    if tasks[0] == 'detection':
        return dict(fpn=dict(student=_features(student_cfg), teacher=_features(teacher_cfg)))
    logits = [_logits(cfg) for cfg in (student_cfg, teacher_cfg)]
    if tasks[0] == 'segmentation':
        if None in logits:  # masks instead of logits
            return dict(feat=dict(student='backbone', teacher='backbone'))
        return dict(
            logits=dict(zip(('student', 'teacher'), logits), neck=dict(distance=dict(type='mmdiffkd.DISTLoss')))
        )
    mse = dict(type='mmdiffkd.MSELoss')
    pairs = dict(feat=dict(student='backbone', teacher='backbone', neck=dict(distance=mse)))
    if None not in logits and student_cfg['head'].get('num_classes') == teacher_cfg['head'].get('num_classes'):
        neck = dict(
            denoiser=dict(type='mmdiffkd.MLPDenoiser'),
            noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter'),
            distance=dict(type='mmdiffkd.KLDivergence'),
        )
        pairs['logits'] = dict(student=logits[0], teacher=logits[1], neck=neck)
    return pairs


def _task(cfg: dict) -> Optional[str]:
    if cfg.get('decode_head'):
        return 'segmentation'
    if any(cfg.get(part) is not None for part in DETECTION_PARTS):
        return 'detection'
    return 'classification' if cfg.get('backbone') and cfg.get('head') else None


def _features(cfg: dict) -> str:
    return 'neck' if cfg.get('neck') else 'backbone'


def _logits(cfg: dict) -> Optional[str]:
    """The module that returns a segmentor's or a classifier's logits; None if there is none."""
    if cfg.get('decode_head'):
        head = cfg['decode_head']  # a cascade's last stage decides
        path = f'decode_head.{len(head) - 1}.conv_seg' if isinstance(head, (list, tuple)) else 'decode_head.conv_seg'
    else:
        path = 'head.fc'
    return path if has_module(cfg, path) else None
