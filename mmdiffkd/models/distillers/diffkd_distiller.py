"""The distiller: builds the teacher, pairs and necks for a student, and adds distillation losses to its losses."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from logging import WARNING
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
from mmengine.config import ConfigDict
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.engine.distributed import attach_unused_params, on_all_ranks
from mmdiffkd.engine.weights import use_checked_files
from mmdiffkd.registry import MODELS
from mmdiffkd.utils.check_config import ConfigError, bind, check_value, in_key
from mmdiffkd.utils.image_settings import ENCODERS
from mmdiffkd.utils.meta_device import build_for_inspection
from mmdiffkd.utils.student_config import write_student_config
from mmdiffkd.version import __version__

from ..diffusion.feature_diffusion import DiffusionOutput
from ..feature_maps import TapError
from ..losses.naming import name_losses, non_finite_names, sum_losses
from ..necks import DistillContext
from .auto_weight import AutoWeight, TapGradients, update_together
from .autograd_graph import find_rows, trains
from .batches import (
    as_data_elements,
    choose_images,
    find_data_samples,
    find_images,
    take_samples,
    use_own_names,
    valid_pixel_mask,
)
from .build_necks import build_neck, infer_taps, match_classes, per_tap
from .classes import ClassMatch, ClassMatcher, Names, class_names, dataset_classes, running_config
from .conversion import (
    BaseDistiller,
    FrozenWeights,
    check_convertible,
    converted_class,
    export,
    make_student_cfg,
)
from .distill_state import DistillRecord
from .feature_info import (
    FeatureInfo,
    check_gradient,
    check_training_outputs,
    encoder_path,
    forward_fns,
)
from .input_renormalizer import check_preprocessor
from .match_levels import match_levels
from .pairs import Pair, check_roi_taps, read_pairs
from .recorders import ModuleInputsRecorder, ModuleOutputsRecorder, find_module, is_roi_tap, record_rois
from .teacher import Teacher


@MODELS.register_module()
class DiffKDDistiller(BaseDistiller):
    """Train a student with the features of a teacher (section 3 of the DiffKD paper).

    ``DiffKDDistiller(...)`` builds the student and converts it with :func:`convert_to_distiller`. The returned model is
    the student, and its class inherits from this class and from the student's class. Parameters, attributes, hooks and
    checkpoint keys keep the student's names, and ``predict`` is the student's method. The diffusion module is the
    submodule ``diffkd``. The teacher is not a submodule.

    To change the training, subclass this class and override methods such as :meth:`loss` or :meth:`read_pairs`.

    Args:
        student (dict): Config of the student. Any mmengine model with a method ``loss`` can be a student, whatever the
            arguments of ``loss`` are.
        teacher (dict, optional): Arguments of :class:`.Teacher`, such as ``config`` (``'pkg::path'``, file or dict) and
            ``checkpoint`` (path, URL or ``'zoo'``). None trains the student alone. Defaults to None.
        distill (dict, optional): Pairs, ``{name: dict(student=, teacher=, levels=, neck=, classes=)}``. None uses the
            default pairs of the preset. Defaults to None.
        preset (str, optional): Distillation method. A preset defines default pairs and settings. ``'diffkd'`` is the
            method of the paper, and :func:`mmdiffkd.apis.list_presets` lists all presets. None uses ``'cosine'`` for a
            teacher that is only an image encoder, such as a model of timm, and ``'diffkd'`` for all others. Defaults to
            None.
        init_from_teacher (list[str], optional): Modules of the student that start with the teacher's weights, such as
            ``['neck', 'bbox_head']``. Defaults to None.
        data_preprocessor (dict, optional): ``data_preprocessor`` at the top level of the config, which the Runner
            passes to the model. Used if the config of the student has no preprocessor. Defaults to None.
        metainfo (dict, optional): ``dict(classes=[...])``, the names of the student's classes. The names are needed to
            match classes if the teacher has different classes. None takes the names from the data sets of the Runner
            that builds the model. Defaults to None.
        task_loss (bool): Whether to train with the student's own losses. If False, only the distillation losses are
            used: weights that no compared feature depends on are frozen, and heads do not run unless a pair taps them.
            Defaults to True.

    Raises:
        ValueError: If a value is invalid, or taps, levels or channels do not fit. The message contains the key.
        FileNotFoundError, ModuleNotFoundError, KeyError: If the teacher's config, package or class is missing. These
            errors are raised when training starts. Building the model only logs a warning, because the model can still
            predict.
    """

    added_attributes = (
        'diffkd_teacher',
        'deferred_error',
        'distill_state',
        'pairs',
        'matched_levels',
        'class_matches',
        'student_info',
        'encoder_path',
        'task_loss',
        'untrained',
        '_wrote_student_config',
        '_init_paths',
        '_metainfo',
        '_class_matcher',
        '_auxiliary_losses',
        '_ignored_labels',
    )

    def __init__(
        self,
        student: dict,
        teacher: Optional[dict] = None,
        distill: Optional[dict] = None,
        preset: Optional[str] = None,
        init_from_teacher: Optional[Sequence[str]] = None,
        data_preprocessor: Optional[dict] = None,
        metainfo: Optional[dict] = None,
        task_loss: bool = True,
    ):
        super().__init__()
        self.diffkd_teacher: Optional[Teacher] = None  # not named 'teacher', because some models have a 'teacher'
        self.deferred_error: Optional[Exception] = None  # raised when training starts, because the teacher is missing
        self.pairs: Dict[str, Pair] = {}
        self.matched_levels: Dict[str, List[List[Tuple[int, int]]]] = {}
        self.class_matches: Dict[str, ClassMatch] = {}
        self.student_info: Dict[str, FeatureInfo] = {}
        self.encoder_path: Optional[str] = None
        if init_from_teacher is not None and init_from_teacher != []:
            check_value('init_from_teacher', init_from_teacher, Union[str, Sequence[str]])
        check_value('metainfo', metainfo, Optional[dict])
        check_value('task_loss', task_loss, bool)
        if teacher is None and not task_loss:
            raise ConfigError('task_loss', '=False trains only the distillation, which needs a teacher.')
        self.task_loss = task_loss
        self.untrained: List[str] = []  # modules that are frozen because no compared feature depends on them
        self._metainfo = metainfo
        self._class_matcher = ClassMatcher()
        self._wrote_student_config = False
        self._init_paths = [init_from_teacher] if isinstance(init_from_teacher, str) else list(init_from_teacher or ())
        if teacher is None:
            return
        if not isinstance(teacher, dict):
            raise ConfigError('teacher', f'={teacher!r} must be dict(config=..., checkpoint=...).')
        if 'type' in teacher:
            raise ConfigError('teacher', ' is the config of a model; use teacher=dict(config=..., checkpoint=...).')
        misplaced = [key for key in ('distill', 'init_from_teacher', 'preset', 'task_loss') if key in teacher]
        if misplaced:
            raise ConfigError(
                f'teacher.{misplaced[0]}', f' is not a setting of the teacher: set model=dict({misplaced[0]}=...).'
            )
        student_cfg = make_student_cfg(student, data_preprocessor=data_preprocessor)
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
            infer_taps(cfg, pairs, owner) for cfg, owner in ((student_cfg, 'student'), (teacher_cfg, 'teacher'))
        )
        self.encoder_path = encoder_path(self)  # find it now: wrappers such as FSDP change the paths of modules later
        channels = next(iter(self.student_info.values())).image_channels
        teacher.expect(_scoped_preprocessor(student_cfg), teacher_info, channels)
        if distill is None:  # leave out default pairs whose student features are frozen, unless all are frozen
            trainable = {
                name: pair
                for name, pair in pairs.items()
                if any(any(self.student_info[tap].requires_grad) for tap in pair.student_taps)
            }
            pairs = trainable or pairs
        self.pairs = pairs
        build_teacher = cache(partial(build_for_inspection, teacher_cfg))  # build once, and only if a check needs it
        self.class_matches, unknown = match_classes(self, pairs, self._class_matcher, build_teacher)
        necks = {}
        for name, pair in pairs.items():
            infos = self.compared_info(name, teacher_info)
            matches = self.matched_levels[name] = [match_levels(name, *info, pair.levels) for info in infos]
            with in_key(f'distill.{name}'):
                necks[name] = build_neck(self, pair, infos, matches, self.class_matches.get(name), unknown.get(name))
        self.diffkd = nn.ModuleDict(necks)
        # read these attributes now, because FSDP wraps the necks later
        self._auxiliary_losses = {name: tuple(getattr(neck, 'auxiliary_losses', ())) for name, neck in necks.items()}
        self._ignored_labels = {name: find_ignore_index(self, pair.student_taps[0]) for name, pair in pairs.items()}
        if self._init_paths:
            self._check_init_paths(build_teacher)
        if not self.task_loss:
            if self.auto_weights:
                raise ConfigError(
                    'task_loss',
                    "=False turns off the student's own losses, but loss_weight='auto' of distill."
                    f'{", distill.".join(self.auto_weights)} needs their gradients; set loss_weight to a number.',
                )
            self._freeze_untrained()
        self.diffkd_teacher = teacher

    def _freeze_untrained(self) -> None:
        """Freeze the weights that no compared feature depends on.

        Otherwise, DDP would wait for the gradients of these weights, and weight decay would shrink them.
        """
        sets = [
            None if (weights := self.student_info[tap].weights) is None else weights[level]
            for name, pair in self.pairs.items()
            for tap, matches in zip(pair.student_taps, self.matched_levels[name])
            for level, _ in matches
        ]
        if None in sets:  # unknown, because activation checkpointing hides weights from the autograd graph
            return
        frozen = FrozenWeights(self, set().union(*sets))
        self._distill_handles.append(frozen)
        self.untrained = frozen.modules
        if self.untrained:
            print_log(
                f'With task_loss=False, these modules of the student are not trained, because no compared feature '
                f'depends on them: {", ".join(self.untrained)}. Their weights keep their initial values.',
                logger='current',
            )

    def _class_names(self, count: int) -> Names:
        """Return the names of the student's classes; None if they are unknown or there are not ``count`` names."""
        names = class_names(self._metainfo)
        if names is None:
            names = dataset_classes(running_config() or {})
        return names if names is not None and len(names) == count else None

    def compared_info(
        self, name: str, teacher_info: Optional[Dict[str, FeatureInfo]] = None
    ) -> List[Tuple[FeatureInfo, FeatureInfo]]:
        """Return information about the features that a pair compares.

        If only the channels of shared classes are compared, ``channels`` counts only these.

        Args:
            name (str): Name of the pair.
            teacher_info (dict[str, FeatureInfo], optional): Features of the teacher's taps. None uses the taps of
                ``diffkd_teacher``. Defaults to None.

        Returns:
            list[tuple[FeatureInfo, FeatureInfo]]: Information about the student's and the teacher's features, one tuple
            per tap.
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

    def _check_init_paths(self, build_teacher: Callable[[], nn.Module]) -> None:
        """Check that the modules in ``init_from_teacher`` have the same weight names and shapes in both models."""
        with in_key('init_from_teacher'):
            targets = {path: find_module(self, path, 'student') for path in self._init_paths}
        for path, target in targets.items():
            with in_key('init_from_teacher'):
                source = find_module(build_teacher(), path, 'teacher')
            _check_same_weights(path, source, target)

    def init_weights(self) -> None:
        """Load the teacher, and initialize the student as without distillation. The Runner calls this before training.

        The modules in ``init_from_teacher`` then get the teacher's weights. The config of the plain student is written
        to the work dir of the run.

        Raises:
            FileNotFoundError, ValueError: If a checkpoint of the teacher or of an ``init_cfg`` does not exist, does not
                fit, or contains objects that could run code. If one rank fails, all ranks raise an error.
        """
        print_log(f'Versions: {", ".join(_versions())}', logger='current')
        self._wrote_student_config = _write_student_config()
        # remove the diffusion module for a moment: otherwise, the student's init_cfg would initialize it again
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
        # first check that no rank has an error: the ranks download the weights together and wait for each other
        on_all_ranks(self._raise_deferred_error)
        if self.diffkd_teacher is not None:
            on_all_ranks(lambda: self.diffkd_teacher.model)

    def _raise_deferred_error(self) -> None:
        if self.deferred_error is not None:
            raise self.deferred_error

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of the student and the diffusion module, as :meth:`torch.nn.Module.train` does."""
        if mode and not self._wrote_student_config:  # FlexibleRunner publishes its config only after init_weights()
            self._wrote_student_config = _write_student_config()
        super().train(mode)
        return self  # train() of some students, such as LAD, returns None

    def _init_from_teacher(self, teacher: nn.Module) -> None:
        """Copy the teacher's weights to the student's modules in ``init_from_teacher``."""
        for path in self._init_paths:
            source, target = find_module(teacher, path, 'teacher'), find_module(self, path, 'student')
            _check_same_weights(path, source, target)
            target.load_state_dict(source.state_dict())

    def loss(self, *args, **kwargs) -> Dict[str, Tensor]:
        """Compute the student's losses and the distillation losses.

        Args:
            *args: Positional arguments of the student's ``loss``. The teacher gets the first image batch among the
                arguments, (N, C, H, W). For models that take views or clips, the teacher gets the input of the
                student's encoder.
            **kwargs: Keyword arguments of the student's ``loss``. A preprocessed batch can be passed as
                ``loss(**batch)``: ``inputs`` and ``data_samples`` are renamed to mmdet's ``batch_inputs`` and
                ``batch_data_samples`` if the student's ``loss`` has these arguments.

        Returns:
            dict[str, Tensor]: The student's losses if ``task_loss`` is True, and the losses of each pair, summed over
            levels: ``diffkd.<pair>.loss_kd``, ``.loss_diffusion``, ``.loss_reconstruction``, and ``.gamma`` (mean over
            levels). If a pair has several levels, the dict also contains ``.kd.<level>``, ``.diffusion.<level>``,
            ``.reconstruction.<level>`` and ``.gamma.<level>`` for the log. If no image of the batch reaches the
            student's tap, the pair returns only ``.loss_kd``, which is 0. An example is the head of a task for which
            the batch has no labels.

        Raises:
            TapError: If there are no images, or a tap returns an output that cannot be distilled.
            ValueError: If ``task_loss`` is False and a hook has turned the distillation off.
        """
        if self.deferred_error is not None:
            raise self.deferred_error
        kwargs = use_own_names(super().loss, kwargs)
        state = self.distill_state
        state.tap_gradients.clear()
        state.has_run = True
        if self.diffkd_teacher is None or not state.enabled:
            if not self.task_loss:
                raise ValueError(
                    'Nothing is trained in this iteration, because task_loss=False and a hook has turned the '
                    'distillation off: remove begin, end and interval from DistillScheduleHook.'
                )
            return super().loss(*args, **kwargs)
        if torch.is_grad_enabled():
            self.update_auto_weights()
        gradients = TapGradients(self.auto_weights, state.weight)
        taps = {tap for pair in self.pairs.values() for tap in pair.student_taps}
        needs_rois = any(is_roi_tap(tap) for pair in self.pairs.values() for tap in pair.teacher_taps)
        with ExitStack() as stack:
            on_copy = gradients.watch if gradients.weights else None
            recorder = stack.enter_context(ModuleOutputsRecorder(self, taps, 'student', on_copy=on_copy))
            rois = stack.enter_context(record_rois(self)) if needs_rois else [None]
            encoder = stack.enter_context(ModuleInputsRecorder(self, self.encoder_path)) if self.encoder_path else None
            if self.task_loss or needs_rois:
                task_losses = dict(super().loss(*args, **kwargs))
            else:
                task_losses = self.run_to_taps(self, args, kwargs)
        losses = dict(task_losses) if self.task_loss else {}
        own_loss = sum_losses(losses) if self.auto_weights else None
        images = self.find_images(args, kwargs, encoder)
        received = list(find_images((args, kwargs)))
        if received and all(images is not other for other in received):
            self._log_once(
                "The student's encoder gets different images from those that loss() receives, for example flipped "
                'images. The teacher gets the images of the encoder. Distillation losses that need ground truth get '
                'no ground truth.'
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
            student = self._student_features(name, pair, recorder, images, task_losses, gradients)
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
            if match is not None:
                student, teacher = (
                    [[match.select(side, level) for level in levels] for levels in features]
                    for side, features in enumerate((student, teacher))
                )
            student, teacher = (self._as_dtype_of_neck(name, features) for features in (student, teacher))
            outputs = self.diffkd[name](per_tap(pair, student), per_tap(pair, teacher), of_pair)
            levels = self.output_levels(name, outputs)
            weight, log = self._loss_weight(name, outputs, own_loss, gradients)
            losses.update(log)
            losses.update(name_losses(name, outputs, levels, weight, self._auxiliary_losses[name]))
            drawn = {level: output for level, output in zip(levels, outputs) if _is_drawable(output)}
            if drawn and rows is None:  # with given rows, the first feature may belong to a later image
                captured[name] = drawn
        if state.capture:
            state.last_record = DistillRecord(images, captured)
        return losses

    def run_to_taps(self, student: nn.Module, args: Sequence, kwargs: dict) -> Dict[str, Tensor]:
        """Run only the part of a student that is needed to reach all taps, without its losses.

        The dry run has found the forward function for this part.

        Args:
            student (Module): This model, or a plain student.
            args (Sequence): Positional arguments of the student's ``loss``.
            kwargs (dict): Keyword arguments of the student's ``loss``.

        Returns:
            dict: Always empty, because no losses are computed.
        """
        images = self.find_images(args, kwargs, None)
        samples = as_data_elements(find_data_samples(args, kwargs, images), images)
        forward_fns(student)[next(iter(self.student_info.values())).forward_fn](images, samples)
        return {}

    @property
    def auto_weights(self) -> Dict[str, AutoWeight]:
        """The :class:`.AutoWeight` of each pair with ``loss_weight='auto'``, by pair."""
        weights = {name: getattr(self.diffkd[name], 'auto_weight', None) for name in self.pairs}
        return {name: weight for name, weight in weights.items() if weight is not None}

    def update_auto_weights(self) -> None:
        """Update all automatic weights from the gradients of the last iteration. All ranks must call this method.

        Raises:
            ValueError: If no gradient has reached the taps of a pair since the start.
        """
        update_together(self.auto_weights)

    def _loss_weight(
        self, name: str, outputs: Sequence, own_loss: Tensor, gradients: TapGradients
    ) -> Tuple[Union[float, Tensor], Dict[str, Tensor]]:
        """Return the factor of a pair's losses, and a dict with the automatic weight for the log.

        The factor applies to the losses that train the student, but not to auxiliary losses of the neck.
        """
        auto, factor = self.auto_weights.get(name), self.distill_state.weight
        if auto is None:
            return factor, {}
        auxiliary = self._auxiliary_losses[name]
        terms = [loss for output in outputs for term, loss in output.losses.items() if term not in auxiliary]
        value = auto.value(own_loss, torch.stack(terms).sum())
        gradients.scales[name] = factor * value
        return gradients.scales[name], {f'{PREFIX}{name}.auto_weight': torch.as_tensor(value, device=own_loss.device)}

    def output_levels(self, name: str, outputs: Sequence) -> List[int]:
        """Return the level number of each output of a pair's neck.

        Args:
            name (str): Name of the pair.
            outputs (list): Outputs of the neck.

        Returns:
            list[int]: The student's level numbers if the neck returns one output per level, otherwise 0, 1, 2, ...
        """
        levels = [s for s, _ in self.matched_levels[name][0]]
        return levels if len(outputs) == len(levels) else list(range(len(outputs)))

    def _student_features(
        self,
        name: str,
        pair: Pair,
        recorder: ModuleOutputsRecorder,
        images: Tensor,
        losses: dict,
        gradients: TapGradients,
    ) -> Optional[List[List[Tensor]]]:
        """Return the student's features of a pair, after checking that they match the dry run.

        Returns:
            list[list[Tensor]], optional: The features by tap and level. None if a tap gets no image of the batch.
        """
        features = []
        for tap, matches in zip(pair.student_taps, self.matched_levels[name]):
            info = self.student_info[tap]
            if not recorder.outputs[tap] and not trains(losses, self._weighted_module(tap)):
                self._log_once(
                    f"distill.{name}: in some batches, no image reaches the student's '{tap}'. The loss of this pair "
                    'is then 0.'
                )
                return None
            calls = recorder.passes(tap, info.calls, all(info.requires_grad))
            check_training_outputs(name, tap, calls[0], info)
            if name in gradients.weights:
                calls = [[[gradients.branch(name, copy) for copy in call] for call in calls_] for calls_ in calls]
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
                        f"distill.{name}: the student's '{tap}' runs in {len(parts)} forward passes with gradients in "
                        'one loss(). Only the first pass is distilled.'
                    )
            if self.distill_state.record_tap_gradients and torch.is_grad_enabled():
                self._record_gradients(name, dict(zip(levels, recorded)))
            features.append(recorded)
        if name in gradients.weights:
            gradients.leave_out_early_levels(name)
        return None if any(not len(level) for levels in features for level in levels) else features

    def _as_dtype_of_neck(self, name: str, features: List[List[Tensor]]) -> List[List[Tensor]]:
        """Convert features to the dtype of the neck's weights. Not needed under autocast, which converts them."""
        device = features[0][0].device.type
        weight = next(self.diffkd[name].parameters(), None)
        if weight is None or _is_autocast_enabled(device):
            return features
        return [[level.to(weight.dtype) for level in levels] for levels in features]

    def _compares(self, name: str, pair: Pair, has_images: bool) -> bool:
        """Return whether to compare the features of a pair in this iteration.

        A neck with SyncBatchNorm waits for all ranks, so its pair is compared only if all ranks have images.

        Args:
            name (str): Name of the pair.
            pair (Pair): The pair.
            has_images (bool): Whether images of this rank's batch reach the student's taps.
        """
        is_partial = any(tap.split('.')[0] not in ('backbone', 'neck') for tap in pair.student_taps)
        syncs = any(isinstance(module, nn.SyncBatchNorm) for module in self.diffkd[name].modules())
        if not (is_partial and syncs):
            return has_images
        everywhere = torch.tensor(has_images, dtype=torch.float32, device=next(self.diffkd[name].parameters()).device)
        all_reduce(everywhere, op='min')  # does nothing on a single rank
        return bool(everywhere)

    def _weighted_module(self, path: str) -> nn.Module:
        """Return the module at a path if it has weights, or else the innermost module around it that has weights."""
        module = find_module(self, path, 'student')
        while next(module.parameters(), None) is None and '.' in path:
            path = path.rpartition('.')[0]
            module = find_module(self, path, 'student')
        return module

    def _partial_rows(
        self, name: str, pair: Pair, student: List[List[Tensor]], teacher: List[List[Tensor]], batch_size: int
    ) -> Optional[Tensor]:
        """Return the indices of the images that the student's features of a pair belong to.

        Returns:
            Tensor, optional: Indices of the images, (M, ). None if the features belong to all images.

        Raises:
            TapError: If the features belong to only some images, and it is unknown to which.
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
        """Return the images for the teacher, which :func:`.choose_images` chooses.

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
        """Record the sum of the gradient at each level. The sum is not finite if any value of the gradient is not."""

        def record(level: int, gradient: Tensor) -> None:
            self.distill_state.tap_gradients[pair, level] = gradient.sum(dtype=torch.float32)

        for level, feature in features.items():
            feature.register_hook(partial(record, level))

    def parse_losses(self, losses: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Sum the losses, and check that the sum is finite.

        Raises:
            ValueError: If the student computes its losses without calling its method ``loss``.
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


def convert_to_distiller(
    student: nn.Module,
    student_cfg: dict,
    teacher: Optional[dict] = None,
    distill: Optional[dict] = None,
    preset: Optional[str] = None,
    init_from_teacher: Optional[Sequence[str]] = None,
    distiller_type: Type[DiffKDDistiller] = DiffKDDistiller,
    metainfo: Optional[dict] = None,
    task_loss: bool = True,
) -> DiffKDDistiller:
    """Convert a built model into a distiller, in place; :func:`export` converts it back.

    Args:
        student (Module): A model with a method ``loss``.
        student_cfg (dict): The config from which the student was built.
        teacher, distill, preset, init_from_teacher: See :class:`DiffKDDistiller`.
        distiller_type (type): The distiller's class. Defaults to ``DiffKDDistiller``.
        metainfo, task_loss: See :class:`DiffKDDistiller`.

    Returns:
        DiffKDDistiller: The same model.

    Raises:
        ValueError: If the model is a distiller already or has no ``loss``, or for a reason in :class:`DiffKDDistiller`.
    """
    check_convertible(student)
    student.__class__ = converted_class(distiller_type, type(student))
    try:
        student.__init__(student_cfg, teacher, distill, preset, init_from_teacher, None, metainfo, task_loss)
    except BaseException:
        export(student)
        raise
    return student


def _check_same_weights(path: str, source: nn.Module, target: nn.Module) -> None:
    """Check that a module has the same weight names and shapes in the teacher and in the student."""
    own, source = target.state_dict(), source.state_dict()
    unfit = [key for key in {**own, **source} if key not in own or key not in source]
    unfit += [key for key in own if key in source and own[key].shape != source[key].shape]
    if unfit:
        raise ValueError(
            f"init_from_teacher=['{path}'] needs the same module in student and teacher, but {len(unfit)} "
            f"weights differ in name or shape (the student's module has {len(own)} weights), for example "
            f"'{path}.{unfit[0]}'."
        )


def _is_drawable(output) -> bool:
    """Return whether both features of an output have the same shape and can be drawn side by side.

    The shapes may differ with ``ATLoss``, which compares features with different channels.
    """
    return isinstance(output, DiffusionOutput) and output.student_latent.shape == output.teacher_latent.shape


def _is_autocast_enabled(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # torch before 2.4
        return torch.is_autocast_enabled() if device == 'cuda' else torch.is_autocast_cpu_enabled()


def _progress() -> float:
    """Return the completed fraction of the training, from 0 to 1."""
    info = MessageHub.get_current_instance().runtime_info
    return min(1.0, info.get('iter', 0) / info['max_iters']) if info.get('max_iters') else 0.0


def _scoped_preprocessor(model_cfg: ConfigDict) -> Optional[dict]:
    """Return the config of a model's preprocessor, with the model's registry scope."""
    preprocessor = model_cfg.get('data_preprocessor')
    if not preprocessor or not preprocessor.get('type') or not model_cfg.get('_scope_'):
        return preprocessor
    return {'_scope_': model_cfg['_scope_'], **preprocessor}


def _write_student_config() -> bool:
    """Write the config of the plain student to the work dir of the current run.

    Returns:
        bool: Whether the run has published its config. If False, nothing is written.
    """
    run_config = MessageHub.get_current_instance().get_info('cfg')
    if run_config is not None and is_main_process():
        write_student_config(run_config)
    return run_config is not None


def _versions() -> List[str]:
    """Return the versions of mmdiffkd and of the imported OpenMMLab packages, for the log."""
    upstream = [name for name in ('mmdet', 'mmseg', 'mmpretrain') if name in sys.modules]
    return [f'mmdiffkd {__version__}', *(f'{name} {sys.modules[name].__version__}' for name in upstream)]


def find_ignore_index(model: nn.Module, path: str) -> Optional[int]:
    """Find the ``ignore_index`` of the head that contains a tap.

    Args:
        model (nn.Module): The student.
        path (str): The tap, for example ``'decode_head.conv_seg'``.

    Returns:
        int, optional: None if the tap is not inside a head with this attribute.
    """
    parts = path.split('.')
    for end in range(len(parts), 0, -1):
        label = getattr(find_module(model, '.'.join(parts[:end]), 'student'), 'ignore_index', None)
        if isinstance(label, int):
            return label
    return None
