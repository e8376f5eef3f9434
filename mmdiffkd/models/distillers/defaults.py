"""What is distilled where a config does not say."""

from typing import Dict, List, Optional, Tuple

from torch import nn

from mmdiffkd.utils import skeleton

from .passes import ENCODERS

DETECTION_PARTS = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head', 'track_head')
# the last layer that returns maps of the batch: MLP-Mixer turns its tokens round after it, TridentNet has a batch for
# each of its branches while it trains
LAST_MAPS = dict(MlpMixer='ln1', TridentResNet='layer2')
# the paper's width of the autoencoder on classifiers' features
CLASSIFIER_LATENT_CHANNELS = 1024


def default_distill(student: nn.Module, student_cfg: dict, teacher_cfg: dict, preset: str = 'paper') -> Dict[str, dict]:
    """The pairs of a student and a teacher of the same task.

    With ``preset='paper'``, as the paper has them:

    - Detectors: neck to neck, or backbone to backbone where a model has no neck.
    - Segmentors: logits before they are resized, by DIST; backbone to backbone where a model has none or both know
      other classes.
    - Classifiers: the last feature map through an autoencoder, and the logits by KL divergence where both know as many
      classes, of which an image has one.
    - Other models: what encodes the images.

    ``preset='plus'`` adds to detectors what the last layers of their dense heads, or else of their RPNs say, without
    denoising: ``cls`` by CWD and ``reg`` by L1, each where both have it for the same anchors and as many outputs.
    Models that wrap a detector, as trackers do, get none of it. Segmentors are compared by the last feature maps of
    their backbones, not by their logits.

    Args:
        student (nn.Module): The student.
        student_cfg (dict): Its config.
        teacher_cfg (dict): Config of the teacher.
        preset (str): ``'paper'`` or ``'plus'``. Defaults to ``'paper'``.

    Returns:
        dict[str, dict]: A ``distill`` to be completed by :func:`read_pairs`.

    Raises:
        ValueError: If the two have different tasks, or keep their encoders elsewhere than upstream.
    """
    tasks = [_task(cfg) for cfg in (student_cfg, teacher_cfg)]
    features = [_features(cfg) for cfg in (student_cfg, teacher_cfg)]
    if tasks[0] != tasks[1] or None in features:
        raise ValueError(
            f'There is no default tap for the student {student_cfg["type"]} and the teacher {teacher_cfg["type"]}; '
            "name one: distill=dict(feat=dict(student='backbone', teacher='backbone'))."
        )
    if tasks[0] == 'detection' and preset == 'paper':
        return dict(fpn=_pair(features))
    models = student, skeleton(teacher_cfg)
    if tasks[0] == 'detection':
        return dict(fpn=_pair(features), **_dense_outputs(models, (student_cfg, teacher_cfg)))
    if tasks[0] == 'segmentation' and preset == 'plus':
        return dict(feat=dict(_pair(features), levels=[-1]))
    logits = _common_logits(tasks[0], models, (student_cfg, teacher_cfg))
    if tasks[0] == 'segmentation':
        return dict(feat=_pair(features)) if logits is None else dict(logits=_pair(logits, distance='DISTLoss'))
    latent_channels = CLASSIFIER_LATENT_CHANNELS if tasks[0] == 'classification' else None
    pairs = dict(feat=_pair(features, distance='MSELoss', latent_channels=latent_channels))
    if logits is not None:
        parts = dict(denoiser=dict(type='mmdiffkd.MLPDenoiser'), noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter'))
        pairs['logits'] = _pair(logits, distance='KLDivergence', **parts)
    return pairs


def _pair(taps, distance: Optional[str] = None, **neck) -> dict:
    if distance is not None:
        neck['distance'] = dict(type=f'mmdiffkd.{distance}')
    return dict(student=taps[0], teacher=taps[1], neck=neck)


def _dense_outputs(models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict]) -> Dict[str, dict]:
    """The last layers of dense heads with the same anchors: classes and boxes, compared as they are."""
    plain = dict(denoise=False, align=False)
    distances = dict(cls=dict(type='mmdiffkd.ChannelWiseDivergence'), reg=dict(type='mmdet.L1Loss'))
    for part in ('bbox_head', 'rpn_head'):
        heads = [getattr(model, part, None) for model in models]
        anchors, coders = (
            [(cfg.get(part) or {}).get(key) for cfg in cfgs] for key in ('anchor_generator', 'bbox_coder')
        )
        if None in heads or anchors[0] != anchors[1]:
            continue
        pairs = {}
        for kind, distance in distances.items():
            is_scaled = any(hasattr(head, 'scales') for head in heads)  # after the layer
            if kind == 'reg' and (anchors[0] is None or coders[0] != coders[1] or is_scaled):  # other meanings
                continue
            ours, theirs = (_outputs(head, kind) for head in heads)
            for name in [name for name in ours if ours[name] == theirs.get(name)][:1]:
                path = f'{part}.{name}'
                pairs[kind] = dict(student=path, teacher=path, neck=dict(plain, distance=distance))
        return pairs
    return {}


def _outputs(head: nn.Module, kind: str) -> Dict[str, int]:
    """The layers of a head that end with its outputs of a kind, and how many those are."""
    layers = {name: layer for name, layer in head.named_children() if name.endswith(f'_{kind}')}
    return {name: layer.out_channels for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}


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


def _common_logits(task: str, models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict]) -> Optional[List[str]]:
    """The layers of logits of student and teacher; None unless both have one, with the same classes, at least two."""
    find = dict(segmentation=_pixel_logits, classification=_class_logits).get(task)
    if find is None:
        return None
    paths, classes = zip(*(find(model, cfg) for model, cfg in zip(models, cfgs)))
    return list(paths) if None not in paths and classes[0] == classes[1] > 1 else None


def _pixel_logits(model: nn.Module, cfg: dict) -> Tuple[Optional[str], int]:
    """A segmentor's layer of logits, of a cascade the last stage's, and its number of classes."""
    head = cfg['decode_head']
    path = f'decode_head.{len(head) - 1}.conv_seg' if isinstance(head, (list, tuple)) else 'decode_head.conv_seg'
    layer = dict(model.named_modules()).get(path)
    return (None, 0) if layer is None else (path, layer.out_channels)


def _class_logits(model: nn.Module, cfg: dict) -> Tuple[Optional[str], int]:
    """A classifier's layer of logits, linear with an output for each class; none where an image has several."""
    head = cfg.get('head') or {}
    kind, classes = str(head.get('type')), head.get('num_classes')
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith('head.') and isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not linear or 'MultiLabel' in kind or 'CSRA' in kind:
        return None, 0
    # stacked layers end with it; behind that of a DeiT comes its distillation token's
    return linear[-1 if 'Stacked' in kind else 0], classes
