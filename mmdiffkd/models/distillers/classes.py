"""Match the classes of student and teacher, and select the channels of the shared classes."""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from mmengine.runner import FlexibleRunner, Runner
from torch import Tensor, nn

from mmdiffkd.utils.check_config import closest_names, get_class
from mmdiffkd.utils.config import LOADERS, package_of
from mmdiffkd.utils.image_settings import nested_datasets

Names = Optional[Tuple[str, ...]]
Mapping = Dict[Union[str, int], Union[str, int, None]]
# layers of detection heads return class scores if their path contains one of these words
CLASS_SCORES = re.compile(r'cls|logits|heatmap')
DETECTION_HEADS = ('bbox_head', 'roi_head', 'mask_head')


class ClassLayer(NamedTuple):
    """A layer that returns class scores.

    Attributes:
        num_classes (int): Number of classes.
        width (int): Scores per anchor: ``num_classes``, or one more if the last score is the score of the background.
    """

    num_classes: int
    width: int


@dataclass(frozen=True)
class ClassMatch:
    """Classes that student and teacher share.

    Attributes:
        layers (tuple[ClassLayer, ClassLayer]): The student's layer and the teacher's layer.
        shared (list[tuple[int, int]]): For each shared class, its number in the student and its number in the teacher.
        names (list[str]): Names of the shared classes. If student and teacher use different names, both are given, as
            in ``'van = car'``.
        left_out (tuple[list[str], list[str]]): Names of the student's and of the teacher's classes that are not shared.
    """

    layers: Tuple[ClassLayer, ClassLayer]
    shared: List[Tuple[int, int]]
    names: List[str]
    left_out: Tuple[List[str], List[str]]
    _indices: Dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self):
        return {**vars(self), '_indices': {}}  # do not copy or pickle the cached tensors, which may be on a GPU

    def channels(self, side: int, count: int) -> List[int]:
        """Return the channels of the shared classes in an output with ``count`` channels, anchor by anchor.

        The channel of the background is kept if both layers have a background score.

        Args:
            side (int): 0 for the student, 1 for the teacher.
            count (int): Number of channels, a multiple of the layer's ``width``.
        """
        classes = [pair[side] for pair in self.shared]
        if all(layer.width > layer.num_classes for layer in self.layers):
            classes.append(self.layers[side].num_classes)
        width = self.layers[side].width
        return [start + number for start in range(0, count, width) for number in classes]

    def select(self, side: int, features: Tensor) -> Tensor:
        """Return the channels of the shared classes of an output.

        Args:
            side (int): 0 for the student, 1 for the teacher.
            features (Tensor): Output of the layer, (N, C, H, W).
        """
        key = side, features.size(1), features.device
        if key not in self._indices:  # create the indices once: they are the same in every iteration
            self._indices[key] = torch.tensor(self.channels(side, features.size(1)), device=features.device)
        return features.index_select(1, self._indices[key])

    def class_numbers(self) -> Tensor:
        """Return the index in ``shared`` of each of the student's K classes, (K, ); -1 for classes not shared."""
        numbers = torch.full((self.layers[0].num_classes,), -1)
        numbers[[ours for ours, _ in self.shared]] = torch.arange(len(self.shared))
        return numbers

    def __str__(self):
        sides = [
            f'{len(names)} of the {owner} ({_some(names)})'
            for owner, names in zip(('student', 'teacher'), self.left_out)
            if names
        ]
        rest = f'; left out: {" and ".join(sides)}' if sides else ''
        return f'{len(self.names)} shared class{"es" * (len(self.names) > 1)} ({_some(self.names, 20)}){rest}'


class UnknownClassesError(ValueError):
    """Student and teacher have different numbers of classes, and the class names of at least one are unknown."""


def _unknown(count: int) -> Names:
    return None


class ClassMatcher:
    """Matches the classes of student and teacher by name.

    Args:
        student (callable, optional): Takes the number of classes and returns the names of the student's classes, or
            None if they are unknown. Defaults to unknown names.
        teacher (callable, optional): Same as ``student``, for the teacher's classes.
        mapping (dict, optional): Mapping of classes for :meth:`count` and ``problem``; see :meth:`match`.
            Defaults to None.
    """

    def __init__(
        self,
        student: Callable[[int], Names] = _unknown,
        teacher: Callable[[int], Names] = _unknown,
        mapping: Optional[Mapping] = None,
    ):
        self.names = student, teacher
        self.mapping = mapping

    def match(
        self, models: Sequence[nn.Module], paths: Sequence[str], mapping: Optional[Mapping] = None
    ) -> Optional[ClassMatch]:
        """Match the classes of two layers.

        Classes match if their names are equal. The comparison ignores case and treats ``_`` and ``-`` as spaces.

        Args:
            models (tuple[Module, Module]): Student and teacher.
            paths (tuple[str, str]): Path of the student's layer and of the teacher's layer.
            mapping (dict, optional): ``{student class: teacher class}`` for classes whose names differ. Classes are
                given by name or number. A teacher class of None leaves the student's class out. Defaults to None.

        Returns:
            ClassMatch, optional: None if the layers do not return class scores, or if both layers have the same classes
                in the same order. If names are unknown, layers with equal numbers of classes are assumed to have the
                same classes.

        Raises:
            UnknownClassesError: If the numbers of classes differ, and the names of the student's or the teacher's
                classes are unknown.
            ValueError: If no class is shared, or the mapping contains a class that does not exist.
        """
        layers = tuple(find_class_layer(model, path) for model, path in zip(models, paths))
        if None in layers:
            return None
        names = [find(layer.num_classes) for find, layer in zip(self.names, layers)]
        counts = [layer.num_classes for layer in layers]
        if None in names and not mapping:
            if counts[0] == counts[1]:
                return None
            unknown = ' and '.join(owner for owner, known in zip(("student's", "teacher's"), names) if known is None)
            key = 'model.metainfo' if names[0] is None else 'teacher.metainfo'
            raise UnknownClassesError(
                f'the student has {counts[0]} classes and the teacher {counts[1]}, and the names of the {unknown} '
                f'classes are unknown: set {key}=dict(classes=[...]), or map numbers of classes, such as classes={{0: '
                '2}; otherwise, distill features.'
            )
        partners = dict(_same_names(*names))
        for ours, theirs in (mapping or {}).items():
            ours = _number(ours, 'student', names[0], counts[0])
            partners.pop(ours, None)
            if theirs is not None:
                partners[ours] = _number(theirs, 'teacher', names[1], counts[1])
        shared = sorted(partners.items())
        twice = [theirs for _, theirs in shared if list(partners.values()).count(theirs) > 1]
        labels = [known or tuple(f'class {number}' for number in range(count)) for known, count in zip(names, counts)]
        if twice:
            raise ValueError(
                f"classes maps two classes of the student to the teacher's class '{labels[1][twice[0]]}'; map one of "
                'the two classes to None.'
            )
        if not shared:
            raise ValueError(
                f'student and teacher have no class in common (student: {_some(labels[0])}; teacher: '
                f'{_some(labels[1])}): map the names, such as classes={{{labels[0][0]!r}: {labels[1][0]!r}}}, or '
                'distill features.'
            )
        if counts[0] == counts[1] and shared == [(number, number) for number in range(counts[0])]:
            return None
        named = [(labels[0][ours], labels[1][theirs]) for ours, theirs in shared]
        titles = [ours if _plain(ours) == _plain(theirs) else f'{ours} = {theirs}' for ours, theirs in named]
        left_out = tuple(
            [name for number, name in enumerate(labels[side]) if number not in {pair[side] for pair in shared}]
            for side in (0, 1)
        )
        return ClassMatch(layers, shared, titles, left_out)

    def count(self, models: Sequence[nn.Module], paths: Sequence[str]) -> int:
        """Return the number of output channels that two layers share. If it is 0, the reason is usually logged.

        Args:
            models (tuple[Module, Module]): Student and teacher.
            paths (tuple[str, str]): Path of the student's layer and of the teacher's layer.
        """
        widths = [_width(model.get_submodule(path)) for model, path in zip(models, paths)]
        try:
            match = self.match(models, paths, self.mapping)
        except ValueError as error:
            if self.mapping and not isinstance(error, UnknownClassesError):
                raise
            print_log(f"'{paths[0]}' is not distilled: {error}", logger='current')
            return 0
        if match is None:
            return widths[0] if widths[0] == widths[1] else 0
        groups = {width // layer.width for width, layer in zip(widths, match.layers)}
        return len(match.channels(0, widths[0])) if len(groups) == 1 else 0

    def problem(self, models: Sequence[nn.Module], paths: Sequence[str]) -> Optional[str]:
        """Return why the classes of two layers do not match, as the end of a sentence; None if they match."""
        try:
            self.match(models, paths, self.mapping)
        except ValueError as error:
            return str(error).rstrip('.')
        return None


def find_class_layer(model: nn.Module, path: str) -> Optional[ClassLayer]:
    """Describe the class scores that a layer returns; None if the layer does not return the scores of all classes.

    Args:
        model (Module): The model.
        path (str): Path of a convolution or linear layer, such as ``'bbox_head.retina_cls'``.
    """
    modules = dict(model.named_modules())
    channels, parts = _width(modules.get(path)), path.split('.')
    heads = (modules.get('.'.join(parts[:end])) for end in range(len(parts) - 1, 0, -1))
    head = next((head for head in heads if isinstance(getattr(head, 'num_classes', None), int)), None)
    if not channels or head is None or 'rpn_head' in parts:  # an RPN scores objects of any class
        return None
    is_detector = any(part in DETECTION_HEADS for part in parts)
    # the layer 'conv' of a ConvModule returns features
    if is_detector and (not CLASS_SCORES.search(path) or parts[-1] == 'conv'):
        return None
    classes, width = head.num_classes, getattr(head, 'cls_out_channels', None)
    widths = [width] if isinstance(width, int) else [classes, classes + 1] if is_detector else [classes]
    for width in widths:
        has_anchors = is_detector and 'roi_head' not in parts
        if width in (classes, classes + 1) and (channels == width or (has_anchors and channels % width == 0)):
            return ClassLayer(classes, width)
    return None


def class_names(metainfo: Optional[dict]) -> Names:
    """Return the class names in the meta information of a data set or checkpoint; None if there are none.

    The key may be ``classes`` or ``CLASSES``, because the versions of OpenMMLab's packages differ.
    """
    values = {key.lower(): value for key, value in (metainfo or {}).items() if isinstance(key, str)}
    classes = values.get('classes')
    if isinstance(classes, str):  # path of a file with the names, which mmengine's data sets accept, too
        try:
            classes = list_from_file(classes)
        except OSError:
            return None
    is_list = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    return tuple(classes) if is_list and classes else None


def dataset_classes(cfg: dict) -> Names:
    """Return the class names of a config's data sets; None if no data set has class names.

    Args:
        cfg (dict): Config of a run. The names are taken from the first data set that has names, in the order training,
            validation, test.
    """
    for loader in LOADERS:
        for dataset in nested_datasets((cfg.get(loader) or {}).get('dataset')):
            found = class_names(dataset.get('metainfo')) or class_names(dict(classes=dataset.get('classes')))
            kind = dataset.get('type')
            if found is None and isinstance(kind, str):
                with DATASETS.switch_scope_and_registry(dataset.get('_scope_') or package_of(cfg)) as registry:
                    kind = get_class(registry, kind)
            found = found or class_names(getattr(kind, 'METAINFO', None))
            if found is not None:
                return found
    return None


def running_config() -> Optional[Config]:
    """Return the config of the Runner that is building a model; None if no Runner is building a model.

    While a model is built, the config is not in the MessageHub yet: mmengine publishes it after building the optimizer.
    Therefore, this function looks for the Runner among its callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get('self')
        if isinstance(caller, (Runner, FlexibleRunner)):
            return getattr(caller, 'cfg', None)
        frame = frame.f_back
    return None


def _width(layer: Optional[nn.Module]) -> int:
    """Return the number of output channels of a convolution or linear layer; 0 for all other modules."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _same_names(ours: Names, theirs: Names) -> List[Tuple[int, int]]:
    numbers = {key: number for number, key in enumerate(_keys(theirs))}
    return [(number, numbers[key]) for number, key in enumerate(_keys(ours)) if key in numbers]


def _keys(names: Names) -> List[Tuple[str, int]]:
    """Return a unique key for each class: its name, and the number of previous classes with the same name.

    ImageNet, for example, has two classes named crane.
    """
    plain = [_plain(name) for name in names or ()]
    counts: Dict[str, int] = Counter()
    keys = []
    for name in plain:
        keys.append((name, counts[name]))
        counts[name] += 1
    return keys


def _plain(name: str) -> str:
    return re.sub(r'[\s_-]+', ' ', name).strip().casefold()


def _number(value: Union[str, int], owner: str, names: Names, count: int) -> int:
    """Return the number of a class that a mapping gives by name or number. Dumped configs contain numbers as text."""
    if value in (names or ()):
        return names.index(value)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count:
        return value
    if isinstance(value, str) and names:
        nearest = closest_names(value, names)
        raise ValueError(f'classes contains {value!r}, which is not a class of the {owner}; the nearest are {nearest}.')
    unknown = '' if names else f", because the names of the {owner}'s classes are unknown"
    raise ValueError(f'classes={value!r} must be the number of a class of the {owner}, from 0 to {count - 1}{unknown}.')


def _some(names: Sequence[str], count: int = 5) -> str:
    rest = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + rest
