"""Default pairs and weights of the paper."""

from typing import Dict, List, Optional, Sequence, Tuple

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.config import type_name
from mmdiffkd.utils.meta_device import build_for_inspection

from ..distillers.classes import ClassMatcher
from ..distillers.feature_info import ENCODERS

DETECTION_PARTS = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head', 'track_head')
# Layers to tap instead of the whole backbone, because the output of the backbone cannot be compared: MLP-Mixer
# transposes its tokens after this layer, and TridentNet returns one batch per branch in training.
LAST_MAPS = dict(MlpMixer='ln1', TridentResNet='layer2')
# latent channels of the paper's autoencoder for classifiers
CLASSIFIER_LATENT_CHANNELS = 1024
# Weights of the feature distance. The paper chooses the weight of a detector so that the loss is about as large as that
# of Faster R-CNN.
FEATURE_LOSS_WEIGHTS = dict(RepPointsDetector=15.0)
DEFAULT_FEATURE_LOSS_WEIGHT = 5.0


@PRESETS.register_module(name='diffkd')
class DiffKDPreset:
    """Default pairs and weights of the paper (Section 4 and Appendix).

    - Detectors: the outputs of the necks, or of the backbones if a model has no neck.
    - Segmentors: the logits at the head's resolution (``conv_seg``), compared by DIST. If a model has no such layer or
      the models share less than two classes: the outputs of the backbones.
    - Classifiers: the last feature maps, through an autoencoder; and the logits, compared by KL divergence, if the
      models share at least two classes and each image has one class.
    - Other models: the outputs of the image encoders.

    To add a preset, subclass this class, or write a class with the same members, and register the class in
    ``mmdiffkd.registry.PRESETS``.

    Attributes:
        neck_defaults (dict): Default arguments of necks with denoising. A config overrides them.
        class_matcher (ClassMatcher): Matches the classes of student and teacher. The distiller sets it.
    """

    neck_defaults: dict = {}
    class_matcher = ClassMatcher()

    def default_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pairs to distill if a config has no ``distill``. Both models must have the same task.

        Args:
            student (nn.Module): The student.
            student_cfg (dict): Config of the student.
            teacher_cfg (dict): Config of the teacher.

        Returns:
            dict[str, dict]: Pairs in the format of ``distill`` in a config.

        Raises:
            ValueError: If the tasks differ, or if a model has none of the modules in ``ENCODERS``.
        """
        task, features = find_task(student_cfg), self._find_features(student_cfg, teacher_cfg)
        if task == 'detection':
            return dict(fpn=make_pair(features))
        models, cfgs = (student, build_for_inspection(teacher_cfg)), (student_cfg, teacher_cfg)
        logits = _common_logits(task, models, cfgs, self.class_matcher)
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
        """Return the pairs that a config can name without setting taps. Arguments: see :meth:`default_pairs`."""
        return self.default_pairs(student, student_cfg, teacher_cfg)

    def default_distance(self, student_cfg: dict) -> dict:
        """Return the config of the distance between features, used if a pair has no ``loss_kd``."""
        detector = type_name(student_cfg['type'])
        loss_weight = FEATURE_LOSS_WEIGHTS.get(detector, DEFAULT_FEATURE_LOSS_WEIGHT)
        return dict(type='mmdiffkd.MSELoss', loss_weight=loss_weight)

    @staticmethod
    def _find_features(student_cfg: dict, teacher_cfg: dict) -> List[str]:
        features = [find_features(cfg) for cfg in (student_cfg, teacher_cfg)]
        if find_task(student_cfg) != find_task(teacher_cfg) or None in features:
            names = [type_name(cfg['type']) for cfg in (student_cfg, teacher_cfg)]
            raise ValueError(
                f'There is no default tap for the student {names[0]} and the teacher {names[1]}; set the taps: '
                "distill=dict(feat=dict(student='backbone', teacher='...')). "
                'tools/analysis_tools/preview.py CONFIG --list-taps teacher lists them.'
            )
        return features


def make_pair(taps: Sequence[str], distance: Optional[str] = None, **neck) -> dict:
    """Make the config of a pair.

    Args:
        taps (Sequence[str]): Tap of the student and tap of the teacher.
        distance (str, optional): Class of ``loss_kd``, such as ``'MSELoss'``. None leaves ``loss_kd`` unset.
        **neck: Arguments of the neck.

    Returns:
        dict: ``student``, ``teacher`` and ``neck``.
    """
    if distance is not None:
        neck['loss_kd'] = dict(type=f'mmdiffkd.{distance}')
    return dict(student=taps[0], teacher=taps[1], neck=neck)


def find_task(cfg: dict) -> str:
    """Return the task of a model's config: ``detection``, ``segmentation``, ``classification`` or ``other``."""
    if cfg.get('decode_head'):
        return 'segmentation'
    if any(cfg.get(part) is not None for part in (*DETECTION_PARTS, 'detector')):
        return 'detection'
    return 'classification' if type_name(cfg['type']) == 'ImageClassifier' else 'other'


def find_features(cfg: dict) -> Optional[str]:
    """Return the path of the module whose features are distilled; None if no module has a known name."""
    if isinstance(cfg.get('detector'), dict):
        inner = find_features(cfg['detector'])
        # a semi-supervised model holds the detector twice, as student and teacher
        is_semi_supervised = 'semi_train_cfg' in cfg
        return inner and f'{"student" if is_semi_supervised else "detector"}.{inner}'
    if cfg.get('neck') and find_task(cfg) == 'detection':
        return 'neck'
    for name in ENCODERS:
        if cfg.get(name):
            is_list = isinstance(cfg[name], (list, tuple))  # a list holds the encoder and its post-processing
            path, encoder = (f'{name}.0', cfg[name][0]) if is_list else (name, cfg[name])
            last = LAST_MAPS.get(type_name(encoder.get('type'))) if isinstance(encoder, dict) else None
            return path if last is None else f'{path}.{last}'
    return None


def _common_logits(
    task: str, models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict], class_matcher: ClassMatcher
) -> Optional[List[str]]:
    """Return the paths of the logit layers of student and teacher.

    None if a model has no logit layer, or the models share less than two classes.
    """
    find = dict(segmentation=_pixel_logits, classification=_class_logits).get(task)
    if find is None:
        return None
    paths = [find(model, cfg) for model, cfg in zip(models, cfgs)]
    return paths if None not in paths and class_matcher.count(models, paths) > 1 else None


def _pixel_logits(model: nn.Module, cfg: dict) -> Optional[str]:
    """Return the path of the logit layer of a segmentor, or of a cascade's last stage; None if there is none."""
    head = cfg['decode_head']
    path = f'decode_head.{len(head) - 1}.conv_seg' if isinstance(head, (list, tuple)) else 'decode_head.conv_seg'
    return path if path in dict(model.named_modules()) else None


def _class_logits(model: nn.Module, cfg: dict) -> Optional[str]:
    """Return the path of a classifier's linear logit layer; None if there is none, and for multi-label classifiers."""
    head = cfg.get('head') or {}
    kind, classes = type_name(head.get('type')), head.get('num_classes')
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith('head.') and isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not linear or 'MultiLabel' in kind or 'CSRA' in kind:
        return None
    # A stacked head ends with its logit layer. Other heads start with the logit layer; the second layer of DeiT's head
    # classifies the distillation token.
    return linear[-1 if 'Stacked' in kind else 0]
