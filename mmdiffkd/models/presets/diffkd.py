"""Default pairs and weights of the paper."""

from typing import Dict, List, Optional, Sequence, Tuple

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.meta_device import build_for_inspection

from ..distillers.feature_info import ENCODERS

DETECTION_PARTS = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head', 'track_head')
# the last layer that returns maps of the batch: MLP-Mixer transposes its tokens after it, TridentNet has a batch for
# each of its branches in training
LAST_MAPS = dict(MlpMixer='ln1', TridentResNet='layer2')
# the paper's width of the autoencoder on classifiers' features
CLASSIFIER_LATENT_CHANNELS = 1024
# The paper's weights of the feature distance; its rule is to choose a weight so that the loss is about Faster R-CNN's.
FEATURE_LOSS_WEIGHTS = dict(RepPointsDetector=15.0)
DEFAULT_FEATURE_LOSS_WEIGHT = 5.0


@PRESETS.register_module(name='diffkd')
class DiffKDPreset:
    """DiffKD as the paper has it.

    - Detectors: neck to neck, or backbone to backbone where a model has no neck.
    - Segmentors: logits before they are resized, by DIST; backbone to backbone where a model has none or the classes
      differ.
    - Classifiers: the last feature map through an autoencoder, and the logits by KL divergence where both models have
      the same number of classes and an image has one class.
    - Other models: the module that encodes the images.

    A preset is a class with these members, registered in ``mmdiffkd.registry.PRESETS``; subclass this one to change
    some of them.

    Attributes:
        neck_defaults (dict): Arguments of necks that denoise, where a config does not give them.
    """

    neck_defaults: dict = {}

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """The pairs of a student and a teacher of the same task, where a config names none.

        Args:
            student (nn.Module): The student.
            student_cfg (dict): Its config.
            teacher_cfg (dict): Config of the teacher.

        Returns:
            dict[str, dict]: Pairs as in ``distill`` of a config.

        Raises:
            ValueError: If the tasks differ, or a model keeps its encoder elsewhere than upstream's models.
        """
        task, features = find_task(student_cfg), self._find_features(student_cfg, teacher_cfg)
        if task == 'detection':
            return dict(fpn=make_pair(features))
        logits = _common_logits(task, (student, build_for_inspection(teacher_cfg)), (student_cfg, teacher_cfg))
        if task == 'segmentation':
            return dict(feat=make_pair(features)) if logits is None else dict(logits=make_pair(logits, 'DISTLoss'))
        latent_channels = CLASSIFIER_LATENT_CHANNELS if task == 'classification' else None
        pairs = dict(feat=make_pair(features, 'MSELoss', latent_channels=latent_channels))
        if logits is not None:
            parts = dict(
                denoiser=dict(type='mmdiffkd.MLPDenoiser'), noise_adapter=dict(type='mmdiffkd.MLPNoiseAdapter')
            )
            pairs['logits'] = make_pair(logits, 'KLDivergence', **parts)
        return pairs

    def known_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """The pairs that a config can name without their taps; see :meth:`default_pairs`."""
        return self.default_pairs(student, student_cfg, teacher_cfg)

    def default_distance(self, student_cfg: dict) -> dict:
        """Config of the distance of features, where a pair gives none."""
        detector = str(student_cfg['type']).split('.')[-1]
        loss_weight = FEATURE_LOSS_WEIGHTS.get(detector, DEFAULT_FEATURE_LOSS_WEIGHT)
        return dict(type='mmdiffkd.MSELoss', loss_weight=loss_weight)

    @staticmethod
    def _find_features(student_cfg: dict, teacher_cfg: dict) -> List[str]:
        features = [find_features(cfg) for cfg in (student_cfg, teacher_cfg)]
        if find_task(student_cfg) != find_task(teacher_cfg) or None in features:
            raise ValueError(
                f'There is no default tap for the student {student_cfg["type"]} and the teacher '
                f"{teacher_cfg['type']}; name one: distill=dict(feat=dict(student='backbone', teacher='backbone'))."
            )
        return features


def make_pair(taps: Sequence[str], distance: Optional[str] = None, **neck) -> dict:
    """A pair of the taps of student and teacher, with what its config says about the neck."""
    if distance is not None:
        neck['loss_kd'] = dict(type=f'mmdiffkd.{distance}')
    return dict(student=taps[0], teacher=taps[1], neck=neck)


def find_task(cfg: dict) -> str:
    """``detection``, ``segmentation``, ``classification`` or ``other``."""
    if cfg.get('decode_head'):
        return 'segmentation'
    if any(cfg.get(part) is not None for part in (*DETECTION_PARTS, 'detector')):
        return 'detection'
    return 'classification' if cfg['type'].split('.')[-1] == 'ImageClassifier' else 'other'


def find_features(cfg: dict) -> Optional[str]:
    """The module whose features are compared; None if it is not where upstream keeps it."""
    if isinstance(cfg.get('detector'), dict):
        inner = find_features(cfg['detector'])
        is_semi_supervised = 'semi_train_cfg' in cfg  # a detector twice, as student and teacher
        return inner and f'{"student" if is_semi_supervised else "detector"}.{inner}'
    if cfg.get('neck') and find_task(cfg) == 'detection':
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
