"""Base class of presets, and functions that find the modules to distill in a model."""

from typing import Dict, List, Optional, Sequence, Tuple

from torch import nn

from mmdiffkd.registry import PRESETS
from mmdiffkd.utils.config import comparable, type_name
from mmdiffkd.utils.image_settings import ENCODERS
from mmdiffkd.utils.meta_device import build_for_inspection

from ..distillers.classes import ClassMatcher
from ..encoders import is_encoder

DETECTION_PARTS = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head', 'panoptic_head', 'track_head')
# Layers to tap instead of the whole backbone, because the output of the backbone cannot be compared: MLP-Mixer
# transposes its tokens after this layer, and TridentNet returns one batch per branch in training.
LAST_MAPS = dict(MlpMixer='ln1', TridentResNet='layer2')
ENCODER = 'encoder'  # task of a teacher that is only an image encoder
FEATURES_NEED = 'a neck or backbone in both models'
LOGITS_NEED = 'segmentors or classifiers that share at least two classes'


class Preset:
    """A distillation method: default pairs, their necks and their weights, by the task of the models.

    A subclass sets the attributes, implements :meth:`default_pairs`, and is registered in ``mmdiffkd.registry.PRESETS``
    under the name that users write in ``preset='...'``. Its docstring describes the method. The docstrings of this
    package have the sections ``Weights`` (the sources of the weights), ``Released code`` (differences from the released
    code) and ``Examples`` (configs). ``python -m benchmarks.preset_pages`` writes a page per preset from them.

    Attributes:
        summary (str): The method in one line.
        paper (str): Citation of the paper.
        released_code (str): Released code that gives the same losses and gradients in the tests; empty if none does.
        needs (str): Requirements on student and teacher, in a few words.
        weights (dict[str, float]): Default ``loss_weight`` of ``distance`` by task: ``detection``,
            ``segmentation``, ``classification``. Models of a task without a weight are refused. Models of an unknown
            task use the weight of classifiers.
        distance (dict): Config of the distance, without ``loss_weight``, for pairs that do not set ``loss_kd``.
        neck_defaults (dict): Default arguments of necks that denoise. ``dict(denoise=False)`` turns denoising off. The
            key ``type`` is the default class of all necks. The config of a pair overrides these defaults.
        class_matcher (ClassMatcher): Matches the classes of student and teacher. The distiller sets it.
    """

    summary: str = ''
    paper: str = ''
    released_code: str = ''
    needs: str = FEATURES_NEED
    weights: Dict[str, float] = {}
    distance: dict = dict(type='mmdiffkd.MSELoss')
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
            ValueError: If the models do not meet the requirements of the preset. The message says what is missing.
        """
        raise NotImplementedError

    def known_pairs(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict) -> Dict[str, dict]:
        """Return the pairs whose taps a config may leave out. Arguments: see :meth:`default_pairs`."""
        return self.default_pairs(student, student_cfg, teacher_cfg)

    def default_distance(self, student_cfg: dict) -> dict:
        """Return the config of the distance for pairs that do not set ``loss_kd``."""
        return dict(self.distance, loss_weight=self.weights[self.check_task(student_cfg)])

    @classmethod
    def name(cls) -> str:
        """Return the name under which the class is registered, or the name of the class."""
        return next((name for name, preset in PRESETS.module_dict.items() if preset is cls), cls.__name__)

    def refusal(self, reason: str) -> ValueError:
        """Return the error to raise if the preset does not fit the models.

        Args:
            reason (str): Rest of the sentence after the name of the preset, such as ``'needs boxes, but ...'``.
        """
        return ValueError(f"preset='{self.name()}' {reason}")

    def check_task(self, cfg: dict) -> str:
        """Return the task of a model: a key of ``weights``.

        Raises:
            ValueError: If the preset has no weight for the task.
        """
        task = find_task(cfg)
        key = 'classification' if task == 'other' else task
        if key not in self.weights:
            raise self.refusal(
                f'is a method for {" and ".join(self.weights)}, but {short_type(cfg)} is a model for '
                f"{'another task' if task == 'other' else task}; choose another preset, such as 'fitnet'."
            )
        return key

    @staticmethod
    def feature_taps(student_cfg: dict, teacher_cfg: dict) -> List[str]:
        """Return the modules of student and teacher whose features are distilled; see :func:`find_features`.

        Raises:
            ValueError: If a model has none of the modules in ``ENCODERS``. Also if the tasks of both models differ,
                unless the teacher is only an image encoder.
        """
        features = [find_features(cfg) for cfg in (student_cfg, teacher_cfg)]
        is_same = find_task(teacher_cfg) in (find_task(student_cfg), ENCODER)
        if not is_same or None in features:
            names = [short_type(cfg) for cfg in (student_cfg, teacher_cfg)]
            raise ValueError(
                f'There is no default tap for the student {names[0]} and the teacher {names[1]}; set the taps: '
                "distill=dict(feat=dict(student='backbone', teacher='...')). "
                'To list them, run: python tools/analysis_tools/preview.py CONFIG --list-taps teacher'
            )
        return features

    def feature_pair(
        self, student_cfg: dict, teacher_cfg: dict, levels: Sequence[int] = (-1,), **neck
    ) -> Dict[str, dict]:
        """Return the pair of features: ``fpn`` with all levels for detectors, ``feat`` for all other models.

        If the teacher is only an image encoder, each level of a detector is compared with the nearest level of the
        encoder. All other models then compare the last level only.

        Args:
            student_cfg (dict): Config of the student.
            teacher_cfg (dict): Config of the teacher.
            levels (list[int]): Levels to compare if the student is not a detector. Defaults to the last level.
            **neck: Arguments of the neck.
        """
        self.check_task(student_cfg)
        pair = make_pair(self.feature_taps(student_cfg, teacher_cfg), **neck)
        if find_task(student_cfg) == 'detection':
            return dict(fpn=dict(pair, levels='nearest') if is_encoder(teacher_cfg) else pair)
        return dict(feat=dict(pair, levels=[-1] if is_encoder(teacher_cfg) else list(levels)))

    def logit_pair(self, student: nn.Module, student_cfg: dict, teacher_cfg: dict, **neck) -> Dict[str, dict]:
        """Return the pair ``logits``, for segmentors and classifiers.

        Args:
            student (nn.Module): The student.
            student_cfg (dict): Config of the student.
            teacher_cfg (dict): Config of the teacher.
            **neck: Arguments of the neck.

        Raises:
            ValueError: If a model has no logit layer, or the models share fewer than two classes.
        """
        self.check_task(student_cfg)
        self.feature_taps(student_cfg, teacher_cfg)  # refuses different tasks
        cfgs, models = (student_cfg, teacher_cfg), (student, build_for_inspection(teacher_cfg))
        taps = find_logits(find_task(student_cfg), models, cfgs, self.class_matcher)
        if taps is None:
            raise self.refusal(f'compares logits, but {missing_logits(models, cfgs, self.class_matcher)}.')
        return dict(logits=make_pair(taps, **neck))


def short_type(cfg: dict) -> str:
    """Return the ``type`` in a model's config, without scope such as ``mmdet.``."""
    return type_name(cfg['type'])


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
    """Return the task of a model's config: ``detection``, ``segmentation``, ``classification`` or ``other``.

    A teacher that is only an image encoder has the task ``encoder``.
    """
    if is_encoder(cfg):
        return ENCODER
    if cfg.get('decode_head'):
        return 'segmentation'
    if any(cfg.get(part) is not None for part in (*DETECTION_PARTS, 'detector')):
        return 'detection'
    return 'classification' if type_name(cfg['type']) == 'ImageClassifier' else 'other'


def is_two_stage(cfg: dict) -> bool:
    """Return whether a config defines a detector with an RoI head."""
    return bool(cfg.get('roi_head') or (cfg.get('detector') or {}).get('roi_head'))


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


def find_logits(
    task: str, models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict], class_matcher: ClassMatcher
) -> Optional[List[str]]:
    """Return the paths of the logit layers of student and teacher.

    None if a model has no logit layer, or the models share fewer than two classes.
    """
    find = LOGIT_FINDERS.get(task)
    if find is None or find_task(cfgs[1]) == ENCODER:
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
    if not linear or is_multi_label(cfg):
        return None
    # A stacked head ends with its logit layer. Other heads start with the logit layer; the second layer of DeiT's head
    # classifies the distillation token.
    return linear[-1 if 'Stacked' in kind else 0]


def is_multi_label(cfg: dict) -> bool:
    """Return whether a config defines a classifier that gives several labels per image."""
    head = cfg.get('head')
    return isinstance(head, dict) and any(part in type_name(head.get('type')) for part in ('MultiLabel', 'CSRA'))


def missing_logits(models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict], class_matcher: ClassMatcher) -> str:
    """Return why :func:`find_logits` found no logits in models of the same task, as the end of a sentence."""
    task = find_task(cfgs[0])
    if find_task(cfgs[1]) == ENCODER:
        return 'the teacher is an image encoder without logits'
    find = LOGIT_FINDERS.get(task)
    found = [None if find is None else find(model, cfg) for model, cfg in zip(models, cfgs)]
    for owner, cfg, path in zip(('student', 'teacher'), cfgs, found):
        if path is None and is_multi_label(cfg):
            return f'the {owner} {short_type(cfg)} gives several labels per image'
        if path is None:
            layer = 'decode_head.conv_seg' if task == 'segmentation' else 'head.fc'
            return f"the {owner} {short_type(cfg)} has no layer such as '{layer}' that gives one logit per class"
    return class_matcher.problem(models, found) or 'there is only one shared class'


def dense_head_pairs(
    models: Tuple[nn.Module, nn.Module], cfgs: Tuple[dict, dict], class_matcher: ClassMatcher
) -> Dict[str, dict]:
    """Return the pairs ``cls`` and ``reg`` of two dense heads with equal anchors, without denoising.

    A pair is left out if its layers cannot be compared. The result is empty if the heads have no comparable layers.
    """
    plain = dict(denoise=False, align=False)
    distances = dict(cls=dict(type='mmdiffkd.ChannelWiseDivergence'), reg=dict(type='mmdet.L1Loss'))
    for part in ('bbox_head', 'rpn_head'):
        heads = [getattr(model, part, None) for model in models]
        anchors, coders = (
            [comparable((cfg.get(part) or {}).get(key)) for cfg in cfgs] for key in ('anchor_generator', 'bbox_coder')
        )
        if None in heads or anchors[0] != anchors[1]:
            continue
        pairs = {}
        for kind, distance in distances.items():
            is_scaled = any(hasattr(head, 'scales') for head in heads)  # FCOS scales the regression after the layer
            # skip regression outputs that may have different meanings, although they have equal shapes
            if kind == 'reg' and (anchors[0] is None or coders[0] != coders[1] or is_scaled):
                continue
            ours, theirs = (_outputs(head, kind) for head in heads)
            for name in [name for name in ours if name in theirs][:1]:
                path = f'{part}.{name}'
                fits = class_matcher.count(models, (path, path)) if kind == 'cls' else ours[name] == theirs[name]
                if not fits:
                    continue
                pairs[kind] = dict(student=path, teacher=path, neck=dict(plain, loss_kd=distance))
        return pairs
    return {}


def _outputs(head: nn.Module, kind: str) -> Dict[str, int]:
    """Return the output channels of a head's convolutions whose names end in ``_{kind}``, by name."""
    layers = {name: layer for name, layer in head.named_children() if name.endswith(f'_{kind}')}
    return {name: layer.out_channels for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}


LOGIT_FINDERS = dict(segmentation=_pixel_logits, classification=_class_logits)
