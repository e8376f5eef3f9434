"""Build the neck of each pair, with the steps before and after: infer features, match classes, and run the neck."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.logging import print_log
from torch import nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, build_part, in_key

from ..feature_maps import TapError
from ..necks import DistillContext, FeatureDiffusionNeck
from ..necks.base import check_neck, try_neck
from .auto_weight import AutoWeight, find_ratio, without_auto
from .classes import ClassMatch, ClassMatcher, UnknownClassesError, find_class_layer
from .feature_info import FeatureInfo, infer_feature_info
from .pairs import Pair
from .recorders import is_roi_tap

TRIAL_SIZE = 128  # height and width of the images from which the shapes of the random features are computed
Levels = List[Tuple[int, int]]  # (student level, teacher level) of each match


def infer_taps(model_cfg: dict, pairs: Dict[str, Pair], owner: str) -> Dict[str, FeatureInfo]:
    """Infer the features of all taps of a model. If a tap is wrong, the error message names the key of its pair.

    Args:
        model_cfg (dict): Config of the model.
        pairs (dict[str, Pair]): All pairs.
        owner (str): ``'student'`` or ``'teacher'``.
    """
    taps = {tap: name for name, pair in pairs.items() for tap in getattr(pair, f'{owner}_taps')}
    try:
        return infer_feature_info(model_cfg, set(taps), owner)
    except TapError as error:
        keys = [f'distill.{name}.{owner}: ' for tap, name in taps.items() if f"'{tap}'" in str(error)]
        raise TapError(f'{"".join(keys[:1])}{error}') from error


def match_classes(
    student: nn.Module, pairs: Dict[str, Pair], matcher: ClassMatcher, build_teacher: Callable[[], nn.Module]
) -> Tuple[Dict[str, ClassMatch], Dict[str, str]]:
    """Match the classes of pairs that compare class scores, and log which classes are left out.

    Args:
        student (Module): The student.
        pairs (dict[str, Pair]): All pairs.
        matcher (ClassMatcher): Matcher that knows the class names of student and teacher.
        build_teacher (callable): Returns the teacher, with or without weights.

    Returns:
        tuple[dict[str, ClassMatch], dict[str, str]]: Two dicts by pair. The first has the match of each pair whose
        classes differ. The second has a message for each pair that has no match because class names are unknown; the
        message says which names to set.

    Raises:
        ValueError: If a pair maps classes but does not compare class scores, or student and teacher share no class.
    """
    matches, unknown = {}, {}
    for name, pair in pairs.items():
        taps = (*pair.student_taps, *pair.teacher_taps)
        if len(taps) > 2 or find_class_layer(student, taps[0]) is None:
            if pair.classes:
                problem = 'a pair with several taps per model does not compare class scores by name'
                problem = problem if len(taps) > 2 else f"'{taps[0]}' does not return class scores"
                raise ConfigError(f'distill.{name}.classes', f': {problem}; remove the key classes.')
            continue
        try:
            with in_key(f'distill.{name}'):
                match = matcher.match((student, build_teacher()), taps, pair.classes)
        except ConfigError as error:
            if not isinstance(error.__cause__, UnknownClassesError) or is_roi_tap(taps[0]):
                raise
            unknown[name] = str(error.__cause__)
            continue
        if match is not None:
            matches[name] = match
            print_log(f'distill.{name}: {match}.', logger='current')
    return matches, unknown


def build_neck(
    student: nn.Module,
    pair: Pair,
    infos: Sequence[Tuple[FeatureInfo, FeatureInfo]],
    matches: Sequence[Levels],
    classes: Optional[ClassMatch] = None,
    unknown: Optional[str] = None,
) -> nn.Module:
    """Build the neck of a pair, and run it once on random features to find errors.

    The random state does not change, so that the student starts with the same weights as without distillation.

    Args:
        student (Module): The student.
        pair (Pair): The pair.
        infos (list[tuple[FeatureInfo, FeatureInfo]]): Features of student and teacher, one tuple per tap.
        matches (list[list[tuple[int, int]]]): Matched levels of student and teacher, one list per tap.
        classes (ClassMatch, optional): The shared classes. None if student and teacher have the same classes, or if the
            pair does not compare class scores. Defaults to None.
        unknown (str, optional): Error message about unknown class names, from :func:`match_classes`. Defaults to None.

    Raises:
        ValueError: If the config is wrong, the channels do not fit, or the neck fails on the random features.
    """
    ours, theirs = (
        [[sides[side].channels[level[side]] for level in levels] for sides, levels in zip(infos, matches)]
        for side in (0, 1)
    )
    channels = dict(student_channels=per_tap(pair, ours), teacher_channels=per_tap(pair, theirs))
    with torch.random.fork_rng(devices=[]):
        with in_key('neck'):
            neck_cfg, is_auto = without_auto(pair.neck)
        try:
            neck = build_part(MODELS, neck_cfg, 'neck', **channels)
        except ConfigError as error:  # if different classes caused the error, name them as the cause
            if unknown is not None:
                raise ConfigError('classes', f': {unknown}') from error
            if classes is not None and ours == [[1]]:
                raise ConfigError(
                    'classes', f": student and teacher share only the class '{classes.names[0]}', but {error}"
                ) from error
            raise
        with in_key('neck'):
            check_neck(neck)
            if isinstance(neck, FeatureDiffusionNeck):  # its constructor has already run its parts on random features
                _check_positions(neck, pair, infos[0], matches[0])
            else:
                _try_neck(neck, student, pair, infos, matches)
            if is_auto:
                neck.auto_weight = AutoWeight(find_ratio(neck, pair.student_taps))
    return neck


def per_tap(pair: Pair, values: list):
    """Return the values, one per tap, in the form that the neck expects.

    A pair whose ``student`` is a single path gets its only value. All other pairs get the list.
    """
    return values[0] if isinstance(pair.student, str) else values


def _check_positions(neck: FeatureDiffusionNeck, pair: Pair, infos: Sequence[FeatureInfo], levels: list) -> None:
    """Raise an error if the loss compares positions but a tap returns vectors: the loss would always be 0."""
    loss = neck.levels[0].loss_kd
    if getattr(loss, 'compares_positions', False):
        for owner, tap, info, index in zip(('student', 'teacher'), (pair.student, pair.teacher), infos, (0, 1)):
            if any(info.strides[level[index]] is None for level in levels):
                raise ConfigError(
                    'loss_kd',
                    f": {type(loss).__name__} compares positions of feature maps, but '{tap}' of the {owner} returns "
                    "vectors; use a different loss or preset, such as preset='fitnet'.",
                )


def _try_neck(neck: nn.Module, student: nn.Module, pair: Pair, infos: Sequence, matches: Sequence[Levels]) -> None:
    """Run a neck on random features, which have the shapes for square images of ``TRIAL_SIZE`` pixels."""
    ours, theirs = (
        [
            [torch.randn(_shape_on(TRIAL_SIZE, sides[side], level[side])).requires_grad_(side == 0) for level in levels]
            for sides, levels in zip(infos, matches)
        ]
        for side in (0, 1)
    )
    images = torch.randn(2, 3, TRIAL_SIZE, TRIAL_SIZE)
    context = DistillContext(images, input_size=(TRIAL_SIZE, TRIAL_SIZE), student=student)
    try_neck(neck, per_tap(pair, ours), per_tap(pair, theirs), context)


def _shape_on(size: int, info: FeatureInfo, level: int) -> Tuple[int, int, int, int]:
    """Return the shape of a level for two square images. A level with stride None is a vector, so its map is 1x1."""
    stride = info.strides[level]
    side = 1 if stride is None else max(1, round(size / stride))
    return 2, info.channels[level], side, side
