import copy
import inspect
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from logging import WARNING
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Type, Union

import torch
from mmengine.config import ConfigDict
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.engine.dist import on_all_ranks
from mmdiffkd.engine.weights import fit_on_load, use_checked_files
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.config import type_name, with_preprocessor
from mmdiffkd.utils.meta_device import build_for_inspection
from mmdiffkd.utils.student_config import write_student_config
from mmdiffkd.utils.validation import ConfigError, bind, build_part, check_value, in_key
from mmdiffkd.version import __version__

from ..diffusion.feature_diffusion import DiffusionOutput
from ..losses.naming import name_losses, non_finite_names
from ..necks import DistillContext, FeatureDiffusionNeck
from ..necks.base import check_neck, try_neck
from .batches import (
    as_data_elements,
    choose_images,
    find_data_samples,
    find_images,
    find_rows,
    take_samples,
    trains,
    valid_pixel_mask,
)
from .classes import (
    ClassMatch,
    ClassMatcher,
    Names,
    UnknownClassesError,
    class_names,
    dataset_classes,
    find_class_layer,
    running_config,
)
from .feature_info import (
    ENCODERS,
    FeatureInfo,
    check_gradient,
    check_training_outputs,
    encoder_path,
    infer_feature_info,
    match_levels,
)
from .input_renormalizer import check_preprocessor
from .pairs import Pair, check_roi_taps, read_pairs
from .recorders import ModuleInputsRecorder, ModuleOutputsRecorder, TapError, find_module, is_roi_tap, record_rois
from .teacher import Teacher

TRIAL_SIZE = 128  # size of the images whose features try a neck


class DistillRecord(NamedTuple):
    """Features compared in one iteration, kept for visualization.

    Attributes:
        images (Tensor): Preprocessed images of the student, (N, C, H, W).
        outputs (dict[str, dict[int, DiffusionOutput]]): Outputs by pair and level. Pairs whose neck does not return
            features are left out.
    """

    images: Tensor
    outputs: Dict[str, Dict[int, DiffusionOutput]]


@dataclass
class DistillState:
    """State that a distiller shares with its hooks: settings made by the hooks, and results for the hooks.

    Attributes:
        enabled (bool): Whether iterations distill. If False, neither the teacher nor the diffusion module runs. Set by
            ``DistillScheduleHook``.
        weight (float): Factor of the losses that compare student and teacher. Set by ``DistillScheduleHook``.
        attach_unused_params (bool): Whether iterations that do not distill add the diffusion module to the graph of the
            loss, because DDP waits for its gradients. Set by ``DistillScheduleHook``.
        skip_non_finite (bool): Whether a loss that is not finite is listed in ``non_finite_losses`` instead of raising
            an error. Set by ``NonFiniteHook``.
        record_tap_gradients (bool): Whether to record ``tap_gradients``. Set by ``NonFiniteHook``.
        capture (bool): Whether the next iteration is kept in ``last_record``. Set by ``DiffKDVisualizationHook``.
        checkpoint (str): Name in messages of the checkpoint that is loaded. Set by ``CheckpointHook``.
        last_record (DistillRecord, optional): The captured iteration.
        non_finite_losses (list[str]): Names of losses that were not finite in the last iteration.
        tap_gradients (dict[tuple[str, int], Tensor]): Sums of the gradients that the student received in the last
            iteration, by pair and level.
        has_run (bool): Whether ``loss`` has been called.
        logged (set[str]): Messages that are logged only once.
    """

    enabled: bool = True
    weight: float = 1.0
    attach_unused_params: bool = False
    skip_non_finite: bool = False
    record_tap_gradients: bool = False
    capture: bool = False
    checkpoint: str = 'The checkpoint'
    last_record: Optional[DistillRecord] = None
    non_finite_losses: List[str] = field(default_factory=list)
    tap_gradients: Dict[Tuple[str, int], Tensor] = field(default_factory=dict)
    has_run: bool = False
    logged: Set[str] = field(default_factory=set)

    def __getstate__(self):
        # results of the last iteration are not copied or pickled with the model
        return {**vars(self), 'last_record': None, 'non_finite_losses': [], 'tap_gradients': {}}


@MODELS.register_module()
class DiffKDDistiller(BaseModel):
    """Train a student with the features of a teacher (paper, section 3).

    ``DiffKDDistiller(...)`` builds the student and converts it, see :func:`convert_to_distiller`: the returned model is
    the student, and its class inherits from this class and from the student's class. Parameters, attributes, hooks and
    checkpoints keep the student's names, and ``predict`` is the student's method. The diffusion module is the submodule
    ``diffkd``. The teacher is not a submodule.

    To change the training, subclass this class and override methods such as :meth:`loss` or :meth:`read_pairs`.

    Args:
        student (dict): Config of the student, any model of mmengine with a method ``loss``, of whatever arguments.
        teacher (dict, optional): ``config`` (``'pkg::path'``, file or dict) and ``checkpoint`` (path, URL or
            ``'zoo'``) of the teacher, and other arguments of :class:`.Teacher`. None trains the student alone. Defaults
            to None.
        distill (dict, optional): Pairs, ``{name: dict(student=, teacher=, levels=, neck=, classes=)}``. None uses the
            pairs of the preset. Defaults to None.
        preset (str, optional): Method, which gives default pairs and settings: ``'diffkd'`` (the paper's), another of
            :func:`mmdiffkd.apis.list_presets`, or a custom preset. Defaults to None: ``'cosine'`` for a teacher of
            timm, torchvision or transformers, ``'diffkd'`` for any other.
        init_from_teacher (list[str], optional): Modules of the student that start with the teacher's weights, such as
            ``['neck', 'bbox_head']``. Defaults to None.
        data_preprocessor (dict, optional): ``data_preprocessor`` of the config, which the Runner passes to the model.
            Used if the config of the student has no preprocessor. Defaults to None.
        metainfo (dict, optional): ``dict(classes=[...])``, the names of the student's classes. They select the shared
            classes of a teacher with other classes. None uses the training set of the Runner that builds the model.
            Defaults to None.

    Raises:
        ValueError: If a value is invalid, or taps, levels or channels do not fit. The message contains the key.
        FileNotFoundError, ModuleNotFoundError, KeyError: If the teacher's config, package or class is missing. Raised
            when training starts; building the model only logs a warning, because the model can still predict.
    """

    _student_type: Optional[type] = None  # class of the student; set by _converted_class

    def __new__(cls, *args, **kwargs):
        if cls._student_type is not None:  # copying or unpickling a converted model
            return super().__new__(cls)
        if {'pretrained', 'train_cfg'} <= set(kwargs) and 'backbone' not in kwargs:
            raise ValueError(
                "The init_model of mmseg opens only the config of the plain student: 'student.py' in the work dir of "
                'the run, or as exported.'
            )
        _check_inherited(cls, kwargs)
        bind(cls.__init__, cls.__name__, (None, *args), kwargs)
        student = MODELS.build(_student_cfg(*args, **kwargs))
        _check_convertible(student)
        student.__class__ = _converted_class(cls, type(student))
        return student

    def __init__(
        self,
        student: dict,
        teacher: Optional[dict] = None,
        distill: Optional[dict] = None,
        preset: Optional[str] = None,
        init_from_teacher: Optional[Sequence[str]] = None,
        data_preprocessor: Optional[dict] = None,
        metainfo: Optional[dict] = None,
    ):
        # do not call BaseModel.__init__: the student is already initialized
        self.diffkd_teacher: Optional[Teacher] = None  # not 'teacher': some models have this attribute
        self.deferred_error: Optional[Exception] = None
        self.distill_state = DistillState()
        self.pairs: Dict[str, Pair] = {}
        self.matched_levels: Dict[str, List[List[Tuple[int, int]]]] = {}
        self.class_matches: Dict[str, ClassMatch] = {}
        self.student_info: Dict[str, FeatureInfo] = {}
        self.encoder_path: Optional[str] = None
        if init_from_teacher is not None and init_from_teacher != []:
            check_value('init_from_teacher', init_from_teacher, Union[str, Sequence[str]])
        check_value('metainfo', metainfo, Optional[dict])
        self._metainfo = metainfo
        self._class_matcher = ClassMatcher()
        self._wrote_student_config = False
        self._init_paths = [init_from_teacher] if isinstance(init_from_teacher, str) else list(init_from_teacher or ())
        self._distill_handles = [
            self._register_load_state_dict_pre_hook(self._fit_weights),
            self._register_load_state_dict_pre_hook(self._drop_diffusion_keys),
            self.register_load_state_dict_post_hook(_allow_missing_diffusion_keys),
        ]
        if teacher is None:
            return
        if not isinstance(teacher, dict):
            raise ConfigError('teacher', f'={teacher!r} must be dict(config=..., checkpoint=...).')
        if 'type' in teacher:
            raise ConfigError('teacher', ' is the config of a model; use teacher=dict(config=..., checkpoint=...).')
        misplaced = [key for key in ('distill', 'init_from_teacher', 'preset') if key in teacher]
        if misplaced:
            raise ConfigError(
                f'teacher.{misplaced[0]}', f' is not a setting of the teacher: set model=dict({misplaced[0]}=...).'
            )
        student_cfg = _student_cfg(student, data_preprocessor=data_preprocessor)
        with in_key('student.data_preprocessor'):
            check_preprocessor(_scoped_preprocessor(student_cfg))
        try:
            with in_key('teacher'):
                bind(Teacher, 'teacher', (), teacher)
                teacher = Teacher(**teacher)
            self._build_pairs(teacher, student_cfg, distill, preset)
        except (OSError, ImportError, KeyError) as error:
            if isinstance(error, KeyError) and 'registry' not in str(error):
                raise
            self.deferred_error = error  # the model can predict without its teacher
            print_log(f'This model cannot be trained because its teacher is missing: {error}', 'current', WARNING)

    def read_pairs(
        self, distill: Optional[dict], student_cfg: dict, teacher_cfg: dict, preset: Optional[str]
    ) -> Dict[str, Pair]:
        """Return the pairs to distill; see :func:`.read_pairs`."""
        return read_pairs(distill, self, student_cfg, teacher_cfg, preset, self._class_matcher)

    def _build_pairs(
        self, teacher: Teacher, student_cfg: ConfigDict, distill: Optional[dict], preset: Optional[str]
    ) -> None:
        teacher_cfg = teacher.model_cfg
        self._class_matcher = ClassMatcher(self._class_names, teacher.class_names)
        pairs = self.read_pairs(distill, student_cfg, teacher_cfg, preset)
        check_roi_taps(pairs, student_cfg, teacher_cfg)
        self.student_info, teacher_info = (
            _infer_feature_info(cfg, pairs, owner)
            for cfg, owner in ((student_cfg, 'student'), (teacher_cfg, 'teacher'))
        )
        self.encoder_path = encoder_path(self)  # before wrappers change the paths of modules
        channels = next(iter(self.student_info.values())).image_channels
        teacher.expect(_scoped_preprocessor(student_cfg), teacher_info, channels)
        if distill is None:  # leave out default pairs with frozen features, unless no pair remains
            trainable = {
                name: pair
                for name, pair in pairs.items()
                if any(any(self.student_info[tap].requires_grad) for tap in pair.student_taps)
            }
            pairs = trainable or pairs
        self.pairs = pairs
        build_teacher = cache(partial(build_for_inspection, teacher_cfg))  # once, and only if a check needs it
        unknown = self._match_classes(build_teacher)
        necks = {}
        for name, pair in pairs.items():
            infos = self.compared_info(name, teacher_info)
            matches = [match_levels(name, *info, pair.levels) for info in infos]
            self.matched_levels[name] = matches
            ours = [[info.channels[s] for s, _ in levels] for (info, _), levels in zip(infos, matches)]
            theirs = [[info.channels[t] for _, t in levels] for (_, info), levels in zip(infos, matches)]
            widths = dict(student_channels=_per_tap(pair, ours), teacher_channels=_per_tap(pair, theirs))
            # fork_rng, so that the student starts with the same weights as without distillation
            with in_key(f'distill.{name}'), torch.random.fork_rng(devices=[]):
                try:
                    necks[name] = build_part(MODELS, pair.neck, 'neck', **widths)
                except ConfigError as error:  # if the classes are the reason, say so
                    match = self.class_matches.get(name)
                    if name in unknown:
                        raise ConfigError('classes', f': {unknown[name]}') from error
                    if match is not None and ours == [[1]]:
                        raise ConfigError(
                            'classes',
                            f": student and teacher share only the class '{match.names[0]}', but {error}",
                        ) from error
                    raise
                with in_key('neck'):
                    check_neck(necks[name])
                    if isinstance(necks[name], FeatureDiffusionNeck):  # which tries its parts itself
                        _check_positions(necks[name], pair, infos[0], matches[0])
                    else:
                        self._try_neck(necks[name], pair, infos, matches)
        self.diffkd = nn.ModuleDict(necks)
        # read the attributes before FSDP wraps the necks
        self._auxiliary_losses = {name: tuple(getattr(neck, 'auxiliary_losses', ())) for name, neck in necks.items()}
        self._ignored_labels = {name: find_ignore_index(self, pair.student_taps[0]) for name, pair in pairs.items()}
        if self._init_paths:
            self._check_init_paths(build_teacher)
        self.diffkd_teacher = teacher

    def _class_names(self, count: int) -> Names:
        """Return the names of the student's classes; None if they are unknown or their number is different."""
        names = class_names(self._metainfo)
        if names is None:
            names = dataset_classes(running_config() or {})
        return names if names is not None and len(names) == count else None

    def _match_classes(self, build_teacher: Callable[[], nn.Module]) -> Dict[str, str]:
        """Match the classes of pairs that compare class scores, and log which classes are left out.

        Returns:
            dict[str, str]: For pairs whose classes differ and are unknown: what to set.
        """
        unknown = {}
        for name, pair in self.pairs.items():
            taps = (*pair.student_taps, *pair.teacher_taps)
            if len(taps) > 2 or find_class_layer(self, taps[0]) is None:
                if pair.classes:
                    raise ConfigError(f'distill.{name}.classes', f": '{taps[0]}' does not return class scores.")
                continue
            try:
                with in_key(f'distill.{name}'):
                    match = self._class_matcher.match((self, build_teacher()), taps, pair.classes)
            except ConfigError as error:
                if not isinstance(error.__cause__, UnknownClassesError) or is_roi_tap(taps[0]):
                    raise
                unknown[name] = str(error.__cause__)
                continue
            if match is not None:
                self.class_matches[name] = match
                print_log(f'distill.{name}: {match}.', logger='current')
        return unknown

    def compared_info(
        self, name: str, teacher_info: Optional[Dict[str, FeatureInfo]] = None
    ) -> List[Tuple[FeatureInfo, FeatureInfo]]:
        """Return what a pair compares: information about both features of every tap, with the selected channels.

        Args:
            name (str): Name of the pair.
            teacher_info (dict[str, FeatureInfo], optional): The teacher's taps. Defaults to those of the teacher.
        """
        pair, teacher_info = self.pairs[name], teacher_info or self.diffkd_teacher.taps
        infos = [(self.student_info[s], teacher_info[t]) for s, t in zip(pair.student_taps, pair.teacher_taps)]
        match = self.class_matches.get(name)
        if match is None:
            return infos
        return [
            tuple(
                info._replace(channels=[channels and len(match.channels(side, channels)) for channels in info.channels])
                for side, info in enumerate(sides)
            )
            for sides in infos
        ]

    def _shared_classes(self, name: str, side: int, features: List[List[Tensor]]) -> List[List[Tensor]]:
        """Select the channels of the classes that student (side 0) and teacher (side 1) share."""
        match = self.class_matches.get(name)
        if match is None:
            return features
        return [
            [
                level.index_select(1, torch.tensor(match.channels(side, level.size(1)), device=level.device))
                for level in levels
            ]
            for levels in features
        ]

    def _check_init_paths(self, build_teacher: Callable[[], nn.Module]) -> None:
        """Check that the modules in ``init_from_teacher`` are the same in student and teacher."""
        with in_key('init_from_teacher'):
            targets = {path: find_module(self, path, 'student') for path in self._init_paths}
        for path, target in targets.items():
            with in_key('init_from_teacher'):
                source = find_module(build_teacher(), path, 'teacher')
            _check_same_weights(path, source, target)

    def _try_neck(self, neck: nn.Module, pair: Pair, infos: list, matches: List[List[Tuple[int, int]]]) -> None:
        """Run a neck on random features with the shapes that images of ``TRIAL_SIZE`` pixels would give."""
        sides: Tuple[list, list] = ([], [])
        for tap_infos, levels in zip(infos, matches):
            for side, info, index in zip(sides, tap_infos, (0, 1)):
                shapes = [_shape_on(TRIAL_SIZE, info, level[index]) for level in levels]
                side.append([torch.randn(shape).requires_grad_(index == 0) for shape in shapes])
        student, teacher = (_per_tap(pair, side) for side in sides)
        images = torch.randn(2, 3, TRIAL_SIZE, TRIAL_SIZE)
        try_neck(neck, student, teacher, DistillContext(images, input_size=(TRIAL_SIZE, TRIAL_SIZE), student=self))

    def init_weights(self) -> None:
        """Load the teacher, and initialize the student as without distillation. The Runner calls this before training.

        The config of the plain student is written to the work dir of the run.

        Raises:
            FileNotFoundError, ValueError: On all ranks, if on any rank the checkpoint of the teacher or of an
                ``init_cfg`` does not exist, does not fit, or contains other objects than data.
        """
        print_log(f'Versions: {", ".join(_versions())}', logger='current')
        self._wrote_student_config = _write_student_config()
        # remove the diffusion module for now: the student's init_cfg would initialize it again
        diffkd = self._modules.pop('diffkd', None)
        try:
            self._load_teacher()
            with use_checked_files(self):
                super().init_weights()
        finally:
            if diffkd is not None:
                self._modules['diffkd'] = diffkd
        if self.diffkd_teacher is not None:
            self._init_from_teacher(self.diffkd_teacher.model)

    def _load_teacher(self) -> None:
        # one call after the other: ranks download weights together, so no rank may stop before the others
        on_all_ranks(self._raise_deferred_error)
        if self.diffkd_teacher is not None:
            on_all_ranks(lambda: self.diffkd_teacher.model)

    def _raise_deferred_error(self) -> None:
        if self.deferred_error is not None:
            raise self.deferred_error

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of the student and the diffusion module; see :meth:`torch.nn.Module.train`."""
        if mode and not self._wrote_student_config:  # FlexibleRunner publishes its config after init_weights
            self._wrote_student_config = _write_student_config()
        return super().train(mode)

    def _init_from_teacher(self, teacher: nn.Module) -> None:
        """Copy the teacher's weights to the modules in ``init_from_teacher``."""
        for path in self._init_paths:
            source, target = find_module(teacher, path, 'teacher'), find_module(self, path, 'student')
            _check_same_weights(path, source, target)
            target.load_state_dict(source.state_dict())

    def loss(self, *args, **kwargs) -> Dict[str, Tensor]:
        """Compute the student's losses and the distillation losses.

        Args:
            *args: Arguments of the student's ``loss``, unchanged. The teacher sees the first image batch among the
                arguments, (N, C, H, W). For models that take views or clips, it sees the input of the student's
                encoder.
            **kwargs: Keyword arguments of the student's ``loss``.

        Returns:
            dict[str, Tensor]: The student's losses, and for every pair the losses of its neck, summed over levels:
            ``diffkd.<pair>.loss_kd``, ``.loss_diffusion``, ``.loss_reconstruction``, and ``.gamma`` (mean over levels).
            If a pair has several levels, ``.kd.<level>``, ``.diffusion.<level>``, ``.reconstruction.<level>`` and
            ``.gamma.<level>`` are logged as well. If no image of the batch reaches the student's tap, such as the head
            of a task without labels, only ``.loss_kd`` is returned, and is 0.

        Raises:
            TapError: If there are no images, or a tap returns something that cannot be distilled.
        """
        if self.deferred_error is not None:
            raise self.deferred_error
        state = self.distill_state
        state.tap_gradients.clear()
        state.has_run = True
        if self.diffkd_teacher is None or not state.enabled:
            return super().loss(*args, **kwargs)
        taps = {tap for pair in self.pairs.values() for tap in pair.student_taps}
        needs_rois = any(is_roi_tap(tap) for pair in self.pairs.values() for tap in pair.teacher_taps)
        with ExitStack() as stack:
            recorder = stack.enter_context(ModuleOutputsRecorder(self, taps, 'student'))
            rois = stack.enter_context(record_rois(self)) if needs_rois else [None]
            encoder = stack.enter_context(ModuleInputsRecorder(self, self.encoder_path)) if self.encoder_path else None
            losses = dict(super().loss(*args, **kwargs))
        images = self.find_images(args, kwargs, encoder)
        received = list(find_images((args, kwargs)))
        if received and all(images is not other for other in received):
            self._log_once(
                'The student encodes other images than loss() receives, for example flipped ones: the teacher gets the '
                'images that the student encodes, and losses that need ground truth get none.'
            )
        samples = find_data_samples(args, kwargs, images)
        teacher_features = self.diffkd_teacher.features(images, as_data_elements(samples, images), rois[0])
        context = DistillContext(
            images=images,
            data_samples=samples,
            input_size=tuple(images.shape[-2:]),
            progress=_progress(),
            student=self,
            teacher=self.diffkd_teacher.running_model,
            capture=state.capture,
        )
        masks: Dict[Optional[int], Optional[Tensor]] = {}
        captured = {}
        for name, pair in self.pairs.items():
            label = self._ignored_labels[name]
            if label not in masks:
                masks[label] = valid_pixel_mask(samples, label)
            student = self._student_features(name, pair, recorder, images, losses)
            if not self._compares(name, pair, student is not None):
                zero = images.new_zeros((), dtype=torch.float32)
                losses[f'{PREFIX}{name}.loss_kd'] = attach_unused_params(zero, self.diffkd[name].parameters())
                continue
            teacher = [
                [teacher_features[tap][t] for _, t in levels]
                for tap, levels in zip(pair.teacher_taps, self.matched_levels[name])
            ]
            match = self.class_matches.get(name)
            of_pair = replace(context, mask=masks[label], class_numbers=match and match.class_numbers())
            rows = self._partial_rows(name, pair, student, teacher, len(images))
            if rows is not None:
                teacher = [[level[rows] for level in levels] for levels in teacher]
                mask = of_pair.mask if of_pair.mask is None else of_pair.mask[rows]
                of_pair = replace(of_pair, images=images[rows], data_samples=take_samples(samples, rows), mask=mask)
            student, teacher = (self._shared_classes(name, *side) for side in enumerate((student, teacher)))
            student, teacher = (self._as_dtype_of_neck(name, features) for features in (student, teacher))
            outputs = self.diffkd[name](_per_tap(pair, student), _per_tap(pair, teacher), of_pair)
            levels = self.output_levels(name, outputs)
            losses.update(name_losses(name, outputs, levels, state.weight, self._auxiliary_losses[name]))
            drawn = {level: output for level, output in zip(levels, outputs) if _is_drawable(output)}
            if drawn and rows is None:  # otherwise, the first feature may not be of the first image
                captured[name] = drawn
        if state.capture:
            state.last_record = DistillRecord(images, captured)
        return losses

    def output_levels(self, name: str, outputs: Sequence) -> List[int]:
        """Return the level number of each output of a pair's neck.

        Args:
            name (str): Name of the pair.
            outputs (list): Outputs of the neck.

        Returns:
            list[int]: The numbers of the student's levels if there is one output per level, otherwise 0, 1, 2, ...
        """
        levels = [s for s, _ in self.matched_levels[name][0]]
        return levels if len(outputs) == len(levels) else list(range(len(outputs)))

    def _student_features(
        self, name: str, pair: Pair, recorder: ModuleOutputsRecorder, images: Tensor, losses: dict
    ) -> Optional[List[List[Tensor]]]:
        """Return the student's features by tap and level, after checking that they match the dry run.

        Returns:
            list[list[Tensor]], optional: None if no image of the batch reaches one of the taps.
        """
        features = []
        for tap, matches in zip(pair.student_taps, self.matched_levels[name]):
            info = self.student_info[tap]
            if not recorder.outputs[tap] and not trains(losses, self._weighted_module(tap)):
                self._log_once(
                    f"distill.{name}: no image of a batch reaches the student's '{tap}'; its loss is 0 then."
                )
                return None
            calls = recorder.passes(tap, info.calls, all(info.requires_grad))
            check_training_outputs(name, tap, calls[0], info)
            passes = [recorder.as_maps(tap, outputs, images.shape[-2:], info.tokens) for outputs in calls]
            levels = [s for s, _ in matches]
            check_gradient(name, tap, passes[0], levels)
            parts = [[features[level] for level in levels] for features in passes]
            is_split = len(parts) > 1 and not is_roi_tap(tap) and sum(len(part[0]) for part in parts) == len(images)
            if is_split:
                recorded = [torch.cat(level) for level in zip(*parts)]
            else:
                recorded = parts[0]
                if len(parts) > 1:
                    self._log_once(
                        f"distill.{name}: the student's '{tap}' runs {len(parts)} times with gradients in one loss(); "
                        'the first of these passes is distilled.'
                    )
            if self.distill_state.record_tap_gradients and torch.is_grad_enabled():
                self._record_gradients(name, dict(zip(levels, recorded)))
            features.append(recorded)
        return None if any(not len(level) for levels in features for level in levels) else features

    def _as_dtype_of_neck(self, name: str, features: List[List[Tensor]]) -> List[List[Tensor]]:
        """Convert features to the type of the neck's weights. Under autocast, the neck's operators convert them."""
        device = features[0][0].device.type
        weight = next(self.diffkd[name].parameters(), None)
        if weight is None or _is_autocast_enabled(device):
            return features
        return [[level.to(weight.dtype) for level in levels] for levels in features]

    def _compares(self, name: str, pair: Pair, has_images: bool) -> bool:
        """Return whether a pair is compared: with SyncBatchNorm, which waits for all ranks, only if all have images."""
        is_partial = any(tap.split('.')[0] not in ('backbone', 'neck') for tap in pair.student_taps)
        syncs = any(isinstance(module, nn.SyncBatchNorm) for module in self.diffkd[name].modules())
        if not (is_partial and syncs):
            return has_images
        everywhere = torch.tensor(has_images, dtype=torch.float32, device=next(self.diffkd[name].parameters()).device)
        all_reduce(everywhere, op='min')  # does nothing on a single rank
        return bool(everywhere)

    def _weighted_module(self, path: str) -> nn.Module:
        """Return the module at a path, or the closest module around it that has weights."""
        module = find_module(self, path, 'student')
        while next(module.parameters(), None) is None and '.' in path:
            path = path.rpartition('.')[0]
            module = find_module(self, path, 'student')
        return module

    def _partial_rows(
        self, name: str, pair: Pair, student: List[List[Tensor]], teacher: List[List[Tensor]], batch_size: int
    ) -> Optional[Tensor]:
        """Return the images that the student's features of a pair belong to; None for all.

        Raises:
            TapError: If the features belong to a part of the batch that is unknown.
        """
        counts = [(len(s), len(t)) for ours, theirs in zip(student, teacher) for s, t in zip(ours, theirs)]
        if all(ours == theirs for ours, theirs in counts) or any(theirs != batch_size for _, theirs in counts):
            return None
        rows = [find_rows(level, batch_size) for levels in student for level in levels]
        if any(part is None or not part.equal(rows[0]) for part in rows):
            raise TapError(
                f"distill.{name}: the student's '{pair.student_taps[0]}' returns features of {len(student[0][0])} "
                f'images for a batch of {batch_size}, and it is unknown which images these are. Tap a module that runs '
                "on the whole batch, such as 'backbone'."
            )
        return rows[0]

    def find_images(self, args: Sequence, kwargs: dict, encoder: Optional[ModuleInputsRecorder]) -> Tensor:
        """Return the images for the teacher; see :func:`.choose_images`.

        Raises:
            TapError: If there are no images.
        """
        images = choose_images(args, kwargs, encoder.images if encoder else [])
        if images is None:
            raise TapError(
                f'The teacher needs images, but neither loss() nor one of the modules {", ".join(ENCODERS)} of the '
                f'student {self._student_type.__name__} receives a tensor of shape (N, C, H, W).'
            )
        return images

    def _log_once(self, message: str) -> None:
        if message not in self.distill_state.logged:
            self.distill_state.logged.add(message)
            print_log(message, 'current', WARNING)

    def _record_gradients(self, pair: str, features: Dict[int, Tensor]) -> None:
        """Record the sum of the gradient of each level, which is not finite if any value of the gradient is not."""

        def record(level: int, gradient: Tensor) -> None:
            self.distill_state.tap_gradients[pair, level] = gradient.sum(dtype=torch.float32)

        for level, feature in features.items():
            feature.register_hook(partial(record, level))

    def parse_losses(self, losses: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Sum the losses.

        Raises:
            ValueError: If the student computes its losses without its method ``loss``.
            FloatingPointError: If the sum is not finite, unless ``skip_non_finite`` is set. The message names the
                losses and the iteration.
        """
        state = self.distill_state
        if self.diffkd_teacher is not None and state.enabled and not state.has_run:
            raise ValueError(
                f'{self._student_type.__name__} computes losses without its method loss(), so nothing is distilled: '
                "its forward(..., mode='loss') must return self.loss(...)."
            )
        loss, log_vars = super().parse_losses(losses)
        if state.attach_unused_params and not state.enabled:
            loss = attach_unused_params(loss, self.diffkd.parameters())
        is_finite = loss.detach().isfinite().all()
        if state.skip_non_finite:
            is_finite = is_finite.float()
            all_reduce(is_finite, op='min')
        state.non_finite_losses = []
        if is_finite:
            return loss, log_vars
        bad = non_finite_names(log_vars)
        if state.skip_non_finite:
            state.non_finite_losses = sorted({name for names in all_gather_object(bad) for name in names})
            return loss, log_vars
        raise FloatingPointError(
            f'The loss is not finite in iteration {MessageHub.get_current_instance().get_info("iter", 0)}: '
            f'{", ".join(bad)}. Lower the learning rate or clip gradients '
            "(optim_wrapper.clip_grad=dict(max_norm=35)); the hook dict(type='mmdiffkd.NonFiniteHook', policy='skip') "
            'skips such iterations.'
        )

    def _fit_weights(self, state_dict: dict, prefix: str, *args) -> None:
        """Fit the weights of a checkpoint to the student. Wrappers of this model load with a prefix."""
        if not prefix:
            fit_on_load(self, state_dict, self.distill_state.checkpoint, 'the student')

    def _drop_diffusion_keys(self, state_dict: dict, prefix: str, *args) -> None:
        """Remove the weights of a diffusion module from a state dict if this model has no teacher.

        Otherwise these weights would be reported as unexpected keys.
        """
        if 'diffkd' not in self._modules:
            for key in [key for key in state_dict if key.startswith(prefix + PREFIX)]:
                del state_dict[key]

    def __reduce_ex__(self, protocol):
        # the class of a converted model is created at run time: pickle creates it again from its two base classes
        return _new_converted, (type(self)._distiller_type, type(self)._student_type), self.__getstate__()

    def __getstate__(self):
        return dict(vars(self))


def convert_to_distiller(
    student: nn.Module,
    student_cfg: dict,
    teacher: Optional[dict] = None,
    distill: Optional[dict] = None,
    preset: Optional[str] = None,
    init_from_teacher: Optional[Sequence[str]] = None,
    distiller_type: Type[DiffKDDistiller] = DiffKDDistiller,
    metainfo: Optional[dict] = None,
) -> DiffKDDistiller:
    """Convert a built model into a distiller, in place; :func:`export` converts it back.

    Args:
        student (Module): A model with a method ``loss``.
        student_cfg (dict): The config from which the student was built.
        teacher, distill, preset, init_from_teacher: See :class:`DiffKDDistiller`.
        distiller_type (type): The distiller's class. Defaults to ``DiffKDDistiller``.
        metainfo: See :class:`DiffKDDistiller`.

    Returns:
        DiffKDDistiller: The same model.

    Raises:
        ValueError: If the model is a distiller already or has no ``loss``, or for a reason in :class:`DiffKDDistiller`.
    """
    _check_convertible(student)
    student.__class__ = _converted_class(distiller_type, type(student))
    try:
        student.__init__(student_cfg, teacher, distill, preset, init_from_teacher, metainfo=metainfo)
    except BaseException:
        export(student)
        raise
    return student


def export(model: DiffKDDistiller) -> nn.Module:
    """Convert a distiller back into the plain student, in place.

    Args:
        model (DiffKDDistiller): The distiller.

    Returns:
        Module: The same model, without teacher and diffusion module.

    Raises:
        ValueError: If the model is not a distiller.
    """
    student_type = getattr(type(model), '_student_type', None)
    if student_type is None:
        raise ValueError(f'{type(model).__name__} is not a distiller; there is nothing to export.')
    for handle in vars(model).pop('_distill_handles', ()):
        handle.remove()
    model._modules.pop('diffkd', None)
    for name in ATTRIBUTES:
        vars(model).pop(name, None)
    model.__class__ = student_type
    return model


# attributes that converting a student adds and export() removes
ATTRIBUTES = (
    'diffkd_teacher',
    'deferred_error',
    'distill_state',
    'pairs',
    'matched_levels',
    'class_matches',
    'student_info',
    'encoder_path',
    '_wrote_student_config',
    '_init_paths',
    '_metainfo',
    '_class_matcher',
    '_auxiliary_losses',
    '_ignored_labels',
)


@cache
def _converted_class(distiller_type: type, student_type: type) -> type:
    """Return a class that inherits from the distiller's class and the student's class."""
    name = f'{distiller_type.__name__.replace("Distiller", "")}{student_type.__name__}'
    members = dict(__module__=__name__, _distiller_type=distiller_type, _student_type=student_type)
    return type(name, (distiller_type, student_type), members)


def _new_converted(distiller_type: type, student_type: type) -> DiffKDDistiller:
    """Return an empty converted model, which pickle and copy fill."""
    cls = _converted_class(distiller_type, student_type)
    return cls.__new__(cls)


def _check_inherited(cls: type, kwargs: dict) -> None:
    """Check that the config does not inherit the keys of the plain student, which its base config sets."""
    own = inspect.signature(cls.__init__).parameters
    student = kwargs.get('student')
    inherited = [key for key in kwargs if key not in own and isinstance(student, dict) and key in student]
    if inherited and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        raise ConfigError(
            inherited[0],
            f' is not an argument of {cls.__name__}, but of the model in the base config: add _delete_=True to the '
            f'model, model=dict(_delete_=True, type=...), so that it does not inherit the keys of that model.',
        )


def _check_convertible(model: nn.Module) -> None:
    if isinstance(model, DiffKDDistiller):
        raise ValueError(f'{type(model).__name__} is a distiller already; export it first.')
    if not callable(getattr(type(model), 'loss', None)):
        raise ValueError(
            f'{type(model).__name__} cannot be a student: it has no loss(inputs, data_samples). Models of mmdet, '
            'mmseg and mmpretrain have this method.'
        )


def _infer_feature_info(model_cfg: dict, pairs: Dict[str, Pair], owner: str) -> Dict[str, FeatureInfo]:
    """Infer the features of all taps of a model. Errors about a tap name the key of its pair."""
    taps = {tap: name for name, pair in pairs.items() for tap in getattr(pair, f'{owner}_taps')}
    try:
        return infer_feature_info(model_cfg, set(taps), owner)
    except TapError as error:
        keys = [f'distill.{name}.{owner}: ' for tap, name in taps.items() if f"'{tap}'" in str(error)]
        raise TapError(f'{"".join(keys[:1])}{error}') from error


def _check_same_weights(path: str, source: nn.Module, target: nn.Module) -> None:
    """Check that a module of the teacher has the weights of the student's module."""
    own, source = target.state_dict(), source.state_dict()
    unfit = [key for key in {**own, **source} if key not in own or key not in source]
    unfit += [key for key in own if key in source and own[key].shape != source[key].shape]
    if unfit:
        raise ValueError(
            f"init_from_teacher=['{path}'] needs the same module in student and teacher, but {len(unfit)} "
            f"weights differ in name or shape (the student's module has {len(own)} weights), for example "
            f"'{path}.{unfit[0]}'."
        )


def _shape_on(size: int, info: FeatureInfo, level: int) -> Tuple[int, int, int, int]:
    """Return the shape of a level for two square images; a vector has the stride None."""
    stride = info.strides[level]
    side = 1 if stride is None else max(1, round(size / stride))
    return 2, info.channels[level], side, side


def _check_positions(neck: FeatureDiffusionNeck, pair: Pair, infos: Sequence[FeatureInfo], levels: list) -> None:
    """Refuse vectors for a loss that compares positions, because the loss would always be 0."""
    loss = neck.levels[0].loss_kd
    if getattr(loss, 'compares_positions', False):
        for owner, tap, info, index in zip(('student', 'teacher'), (pair.student, pair.teacher), infos, (0, 1)):
            if any(info.strides[level[index]] is None for level in levels):
                raise ConfigError(
                    'loss_kd',
                    f": {type(loss).__name__} compares positions of feature maps, but '{tap}' of the {owner} gives "
                    "vectors; use another loss or preset, such as 'fitnet'.",
                )


def _is_drawable(output) -> bool:
    """Return whether an output has features that can be drawn side by side: ATLoss compares different channels."""
    return isinstance(output, DiffusionOutput) and output.student_latent.shape == output.teacher_latent.shape


def _per_tap(pair: Pair, values: list):
    """Return the list with one value per tap, or only the value if the pair has a single tap."""
    return values[0] if isinstance(pair.student, str) else values


def _is_autocast_enabled(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch before 2.4
        return torch.is_autocast_enabled() if device == 'cuda' else torch.is_autocast_cpu_enabled()


def _progress() -> float:
    """Return the completed fraction of the training, from 0 to 1."""
    info = MessageHub.get_current_instance().runtime_info
    return min(1.0, info.get('iter', 0) / info['max_iters']) if info.get('max_iters') else 0.0


def _allow_missing_diffusion_keys(model: nn.Module, incompatible_keys) -> None:
    """Accept checkpoints of the plain student, which have no diffusion module."""
    missing = incompatible_keys.missing_keys
    diffusion_keys = [name for name, _ in model.named_parameters() if name.startswith(PREFIX)]
    if diffusion_keys and set(diffusion_keys) <= set(missing):
        missing[:] = [key for key in missing if not key.startswith(PREFIX)]
        print_log(
            'The checkpoint has no diffusion module (diffkd.*); the diffusion module keeps its initial weights.',
            logger='current',
        )


def _student_cfg(student: Optional[dict] = None, *args, data_preprocessor: Optional[dict] = None, **kwargs):
    if not isinstance(student, dict) or 'type' not in student:
        raise ValueError("student must be the config of a model, such as student=_base_.model: a dict with a 'type'.")
    if 'student' in student:
        raise ValueError(
            f"The student's config is already a {type_name(student['type'])}; use its student: "
            'student=_base_.model.student.'
        )
    misplaced = [key for key in ('distill', 'init_from_teacher', 'preset') if key in student]
    if misplaced:
        raise ConfigError(
            f'student.{misplaced[0]}', f' has no effect on the student: set model=dict({misplaced[0]}=...) instead.'
        )
    cfg = copy.deepcopy(ConfigDict(student))  # some models change their config while they are built
    return with_preprocessor(cfg, data_preprocessor)


def _scoped_preprocessor(model_cfg: ConfigDict) -> Optional[dict]:
    """Return the config of a model's preprocessor with the scope of the model."""
    preprocessor = model_cfg.get('data_preprocessor')
    if not preprocessor or not preprocessor.get('type') or not model_cfg.get('_scope_'):
        return preprocessor
    return {'_scope_': model_cfg['_scope_'], **preprocessor}


def _write_student_config() -> bool:
    """Write the plain student's config of the current run. Return whether the run has published its config."""
    run_config = MessageHub.get_current_instance().get_info('cfg')
    if run_config is not None and is_main_process():
        write_student_config(run_config)
    return run_config is not None


def _versions() -> List[str]:
    """Versions of this package and of the imported OpenMMLab packages, for the log."""
    upstream = [name for name in ('mmdet', 'mmseg', 'mmpretrain') if name in sys.modules]
    return [f'mmdiffkd {__version__}', *(f'{name} {sys.modules[name].__version__}' for name in upstream)]


class _AttachUnused(torch.autograd.Function):
    """Identity function that adds parameters to the graph. Their gradients are None, which costs no computation."""

    @staticmethod
    def forward(ctx, loss, *parameters):
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient, *[None] * ctx.count)


def attach_unused_params(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Add unused parameters to the graph of a loss, with gradients of None.

    Needed for DDP, which waits for the gradient of every registered parameter in every iteration.

    Args:
        loss (Tensor): Scalar.
        parameters (iterable[Parameter]): Parameters that the loss does not depend on.

    Returns:
        Tensor: The same loss.
    """
    return _AttachUnused.apply(loss, *parameters)


def find_ignore_index(model: nn.Module, path: str) -> Optional[int]:
    """Find the ``ignore_index`` of the head that contains a tap; None for taps outside of heads with this attribute.

    Args:
        model (nn.Module): The student.
        path (str): The tap, for example ``'decode_head.conv_seg'``.
    """
    parts = path.split('.')
    for end in range(len(parts), 0, -1):
        label = getattr(find_module(model, '.'.join(parts[:end]), 'student'), 'ignore_index', None)
        if isinstance(label, int):
            return label
    return None
