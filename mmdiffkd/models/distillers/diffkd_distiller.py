import copy
import sys
from contextlib import ExitStack
from functools import cache, partial
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import ConfigDict
from mmengine.dist import all_gather_object, all_reduce
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdiffkd.registry import MODELS
from mmdiffkd.utils import PREFIX, check_is_data, nearest, with_preprocessor
from mmdiffkd.version import __version__

from ..diffusion import DiffusionOutput
from ..necks import FeatureDiffusionNeck
from .idle import touching
from .ignored import counted_pixels, ignore_index_of
from .levels import match_levels
from .log_names import name_losses, non_finite_names
from .pairs import read_pairs
from .passes import ENCODERS, ImageRecorder, encoder_path
from .probe import check_gradient, check_training_outputs, probe
from .roi import check_roi_taps, is_roi_tap, record_rois
from .taps import TapError, TapRecorder, find_module
from .teacher import Teacher


class Kept(NamedTuple):
    """What an iteration compared, to be looked at after it.

    Attributes:
        images (Tensor): Preprocessed images of the student, (N, 3, H, W).
        outputs (dict[str, dict[int, DiffusionOutput]]): By pair and level, with their samples; of a
            ``FeatureDiffusionNeck`` only.
    """

    images: Tensor
    outputs: Dict[str, Dict[int, DiffusionOutput]]


@MODELS.register_module()
class DiffKDDistiller(BaseModel):
    """Distil a teacher into a student while the student stays what it is.

    Building one gives the student itself, its class extended by this one: parameters, attributes, hooks and
    checkpoints keep the student's names, and ``predict`` is the student's own. Only :meth:`loss` does more. The
    diffusion part is registered under ``diffkd``, the teacher is not registered at all.

    Args:
        student (dict): Config of the student, any model with ``loss(inputs, data_samples)``.
        teacher (dict, optional): ``config`` (``'pkg::path'``, file or dict) and ``checkpoint`` (path, URL or
            ``'zoo'``) of the teacher. None trains the student alone. Defaults to None.
        distill (dict, optional): What is compared, ``{name: dict(student=, teacher=, levels=, neck=)}``. Defaults to
            what :func:`.default_distill` has for the task.
        preset (str): What pairs are by default, ``'paper'`` or ``'plus'``; see :func:`.read_pairs`. Defaults to
            ``'paper'``.
        inherit (list[str], optional): Modules whose weights the student takes from the teacher before training, such
            as ``['neck', 'bbox_head']``. Defaults to None.
        data_preprocessor (dict, optional): Top-level preprocessor that the Runner hands over; the student gets it
            where it has none of its own.

    Raises:
        ValueError: If a tap, a level or a width does not fit; known when the model is built.
        Exception: What else keeps the teacher from being built, such as FileNotFoundError for its config; raised when
            training starts, since predicting does not need it.
    """

    def __new__(cls, *args, **kwargs):
        if cls is not DiffKDDistiller:  # a copy of a distiller that was built before
            return super().__new__(cls)
        model = MODELS.build(_student_cfg(*args, **kwargs))
        model.__class__ = _distiller_class(type(model))
        return model

    def __init__(
        self,
        student: dict,
        teacher: Optional[dict] = None,
        distill: Optional[dict] = None,
        preset: str = 'paper',
        inherit: Optional[Sequence[str]] = None,
        data_preprocessor: Optional[dict] = None,
    ):
        # __new__ has built the student: BaseModel.__init__ must not run again
        self.diffkd_teacher: Optional[Teacher] = None  # some models have a 'teacher' of their own
        self.deferred_error: Optional[Exception] = None
        self.distill_weight: Optional[float] = 1.0  # set by DistillScheduleHook; None rests the distillation
        self.touch_idle_part = False  # set by DistillScheduleHook
        self.skip_non_finite = False  # set by NonFiniteHook
        self.watch_tap_gradients = False  # set by NonFiniteHook
        self.keep_outputs = False  # set by DiffKDVisualizationHook
        self.kept: Optional[Kept] = None
        self.non_finite_losses: List[str] = []
        self.tap_gradients: Dict[Tuple[str, int], Tensor] = {}  # sums, by pair and level
        self._inherit = [inherit] if isinstance(inherit, str) else list(inherit or ())
        self._register_load_state_dict_pre_hook(self._forget_absent_part)
        self.register_load_state_dict_post_hook(_keep_fresh_part)
        if teacher is None:
            return
        _check_teacher_keys(teacher)
        student_cfg = _student_cfg(student, data_preprocessor=data_preprocessor)
        try:
            self._build_pairs(Teacher(**teacher), student_cfg, distill, preset)
        except ValueError:  # a mistake in this config
            raise
        except Exception as error:  # the teacher cannot be had here, which matters to training alone
            self.deferred_error = error

    def _build_pairs(self, teacher: Teacher, student_cfg: ConfigDict, distill: Optional[dict], preset: str) -> None:
        teacher_cfg = teacher.model_cfg
        self.pairs = read_pairs(distill, self, student_cfg, teacher_cfg, preset)
        check_roi_taps(self.pairs, student_cfg, teacher_cfg)
        student_taps = probe(student_cfg, {pair.student for pair in self.pairs.values()}, 'student')
        teacher_taps = probe(teacher_cfg, {pair.teacher for pair in self.pairs.values()}, 'teacher')
        self._student_taps = student_taps
        self._encoder = encoder_path(self)  # now, before anything is wrapped
        teacher.expect(student_cfg.get('data_preprocessor'), teacher_taps)

        if distill is None:  # what is frozen is left out while there is anything else
            learning = {name: pair for name, pair in self.pairs.items() if any(student_taps[pair.student].learns)}
            self.pairs = learning or self.pairs
        self._matches = {}
        necks = {}
        for name, pair in self.pairs.items():
            ours, theirs = student_taps[pair.student], teacher_taps[pair.teacher]
            matches = self._matches[name] = match_levels(name, ours, theirs, pair.levels)
            widths = dict(
                student_channels=[ours.channels[s] for s, _ in matches],
                teacher_channels=[theirs.channels[t] for _, t in matches],
            )
            try:
                # the student starts from the weights that it starts from alone with the same seed
                with torch.random.fork_rng(devices=[]):
                    necks[name] = MODELS.build(pair.neck, default_args=widths)
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f'distill.{name}.neck cannot be built: {error}') from error
        self.diffkd = nn.ModuleDict(necks)
        # now, before FSDP wraps them; other necks may have no samples to keep
        self._with_samples = {name for name, neck in necks.items() if isinstance(neck, FeatureDiffusionNeck)}
        self._ignored_labels = {name: ignore_index_of(self, pair.student) for name, pair in self.pairs.items()}
        for path in self._inherit:
            find_module(self, path, 'student')
        self.diffkd_teacher = teacher

    def init_weights(self) -> None:
        """Initialise the student as upstream does, then bring in the teacher: training is about to start.

        Raises:
            FileNotFoundError, ValueError: If the weights of the teacher, or those an ``init_cfg`` names, are not there,
                do not fit, or hold more than data.
        """
        if self.deferred_error is not None:
            raise self.deferred_error
        print_log(f'Versions: {", ".join(_versions())}', logger='current')
        # the student's init_cfg reaches every registered module; the diffusion part keeps its own initialisation
        diffkd = self._modules.pop('diffkd', None)
        try:
            for source in _pretrained_files(self):
                check_is_data(source)
            super().init_weights()
        finally:
            if diffkd is not None:
                self._modules['diffkd'] = diffkd
        if self.diffkd_teacher is not None:
            self._take_over(self.diffkd_teacher.model)

    def _take_over(self, teacher: nn.Module) -> None:
        """Inheriting: start modules of the student with the teacher's weights."""
        for path in self._inherit:
            source = find_module(teacher, path, 'teacher').state_dict()
            target = find_module(self, path, 'student')
            own = target.state_dict()
            unfit = [key for key in {**own, **source} if key not in own or key not in source]
            unfit += [key for key in own if key in source and own[key].shape != source[key].shape]
            if unfit:
                raise ValueError(
                    f"inherit=['{path}'] needs the same module in student and teacher, but {len(unfit)} of its "
                    f"{len(own)} weights differ, among them '{path}.{unfit[0]}'."
                )
            target.load_state_dict(source)

    def loss(self, inputs: Tensor, data_samples: Optional[list] = None, **kwargs) -> Dict[str, Tensor]:
        """The student's losses and those of the distillation.

        Args:
            inputs (Tensor): Preprocessed images, (N, 3, H, W). Of models that take views or clips, the teacher sees
                what the student's encoder is first called with.
            data_samples (list, optional): Their data samples.

        Returns:
            dict[str, Tensor]: The student's own losses, and for every pair ``diffkd.<pair>.loss_kd``,
            ``.loss_diffusion``, ``.loss_reconstruction`` (summed over levels) and ``.gamma`` (their mean). Where a
            pair has several levels, ``.kd.<level>``, ``.diffusion.<level>``, ``.reconstruction.<level>`` and
            ``.gamma.<level>`` tell them apart; these are logged, not optimised.
        """
        if self.deferred_error is not None:
            raise self.deferred_error
        self.tap_gradients.clear()
        if self.diffkd_teacher is None or self.distill_weight is None:
            return super().loss(inputs, data_samples, **kwargs)
        is_images = isinstance(inputs, Tensor) and inputs.dim() == 4  # not views or clips
        needs_rois = any(is_roi_tap(pair.teacher) for pair in self.pairs.values())
        with ExitStack() as stack:
            taps = stack.enter_context(TapRecorder(self, {pair.student for pair in self.pairs.values()}, 'student'))
            rois = stack.enter_context(record_rois(self)) if needs_rois else [None]
            if not is_images:
                recorder = stack.enter_context(self._record_images())
            losses = dict(super().loss(inputs, data_samples, **kwargs))
        images, samples = (inputs, data_samples) if is_images else (recorder.images[0], None)
        size, masks, kept = images.shape[-2:], {}, {}
        teacher_features = self.diffkd_teacher.features(images, samples, rois[0])
        for name, pair in self.pairs.items():
            tap = self._student_taps[pair.student]
            check_training_outputs(name, pair.student, taps.outputs[pair.student], tap)
            student = taps.features(pair.student, size, tap.tokens)
            teacher = teacher_features[pair.teacher]
            levels = [s for s, _ in self._matches[name]]
            check_gradient(name, pair.student, student, levels)
            if self.watch_tap_gradients and torch.is_grad_enabled():
                self._watch(name, {level: student[level] for level in levels})
            label = self._ignored_labels[name]
            if label not in masks:
                masks[label] = counted_pixels(samples, label)
            options = {} if masks[label] is None else dict(mask=masks[label])
            is_kept = self.keep_outputs and name in self._with_samples
            if is_kept:
                options['keep_samples'] = True
            outputs = self.diffkd[name](
                [student[s] for s in levels], [teacher[t] for _, t in self._matches[name]], **options
            )
            losses.update(name_losses(name, outputs, levels, self.distill_weight))
            if is_kept:
                kept[name] = dict(zip(levels, outputs))
        if self.keep_outputs:
            self.kept = Kept(images, kept)
        return losses

    def _record_images(self) -> ImageRecorder:
        if self._encoder is None:
            raise TapError(
                f'{type(self).__mro__[2].__name__} takes views or clips, and its encoder, which tells what the teacher '
                f'sees, is none of {", ".join(ENCODERS)}.'
            )
        return ImageRecorder(self, self._encoder)

    def _watch(self, pair: str, features: Dict[int, Tensor]) -> None:
        """Sum up the gradients that reach the student through a pair; the sum of one that breaks is not finite."""

        def note(level: int, gradient: Tensor) -> None:
            self.tap_gradients[pair, level] = gradient.sum(dtype=torch.float32)

        for level, feature in features.items():
            feature.register_hook(partial(note, level))

    def parse_losses(self, losses: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Sum up the losses.

        Raises:
            FloatingPointError: If the sum is not finite; it names the losses and the iteration.
        """
        loss, log_vars = super().parse_losses(losses)
        if self.touch_idle_part and self.distill_weight is None:
            loss = touching(loss, self.diffkd.parameters())
        is_finite = loss.detach().isfinite().all()
        if self.skip_non_finite:
            is_finite = is_finite.float()
            all_reduce(is_finite, op='min')
        self.non_finite_losses = []
        if is_finite:
            return loss, log_vars
        bad = non_finite_names(log_vars)
        if self.skip_non_finite:
            self.non_finite_losses = sorted({name for names in all_gather_object(bad) for name in names})
            return loss, log_vars
        raise FloatingPointError(
            f'The loss is not finite in iteration {MessageHub.get_current_instance().get_info("iter", 0)}: '
            f'{", ".join(bad)}. Lower the learning rate or clip gradients '
            "(optim_wrapper.clip_grad=dict(max_norm=35)); the hook dict(type='mmdiffkd.NonFiniteHook', policy='skip') "
            'leaves such iterations out.'
        )

    def _forget_absent_part(self, state_dict: dict, prefix: str, *args) -> None:
        """Without a teacher there is no diffusion part: its weights in a checkpoint are no surprise."""
        if 'diffkd' not in self._modules:
            for key in [key for key in state_dict if key.startswith(prefix + PREFIX)]:
                del state_dict[key]


def _keep_fresh_part(model: nn.Module, incompatible_keys) -> None:
    """A checkpoint of the plain student starts the student, not the diffusion part: nothing is missing then."""
    missing = incompatible_keys.missing_keys
    part = [name for name, _ in model.named_parameters() if name.startswith(PREFIX)]
    if part and set(part) <= set(missing):
        missing[:] = [key for key in missing if not key.startswith(PREFIX)]
        print_log('The checkpoint holds no diffusion part (diffkd.*), it starts fresh.', logger='current')


def _student_cfg(student: Optional[dict] = None, *args, data_preprocessor: Optional[dict] = None, **kwargs):
    if not isinstance(student, dict) or 'type' not in student:
        raise ValueError("student must be the config of a model, such as student=_base_.model: a dict with a 'type'.")
    if 'student' in student:
        raise ValueError(
            f"The student's config is a {student['type']} itself; use its student: student=_base_.model.student."
        )
    cfg = copy.deepcopy(ConfigDict(student))  # some models change their config while they are built
    return with_preprocessor(cfg, data_preprocessor)


def _versions() -> List[str]:
    """This package's, and those of the packages that models come from, for the log."""
    upstream = [name for name in ('mmdet', 'mmseg', 'mmpretrain') if name in sys.modules]
    return [f'mmdiffkd {__version__}', *(f'{name} {sys.modules[name].__version__}' for name in upstream)]


def _check_teacher_keys(teacher: dict) -> None:
    if not isinstance(teacher, dict):
        raise ValueError(f'teacher={teacher!r} must be dict(config=..., checkpoint=...).')
    keys = ('config', 'checkpoint', 'dtype', 'channels_last', 'compile')
    for key in teacher:
        if key not in keys:
            raise ValueError(f"teacher has no key '{key}'; the nearest are {nearest(key, keys)}.")
    if 'config' not in teacher:
        raise ValueError("teacher.config is missing: give 'pkg::path', a file or a dict.")


def _pretrained_files(model: nn.Module) -> List[str]:
    """The files that ``init_cfg`` of a model's parts names."""

    def named_in(cfg) -> List[str]:
        if isinstance(cfg, (list, tuple)):
            return [file for entry in cfg for file in named_in(entry)]
        if not isinstance(cfg, dict):
            return []
        return [*filter(None, [cfg.get('checkpoint')]), *named_in(cfg.get('override'))]

    return [file for module in model.modules() for file in named_in(getattr(module, 'init_cfg', None))]


@cache
def _distiller_class(student_class: type) -> type:
    """The student's class, extended by the distiller."""
    return type(f'DiffKD{student_class.__name__}', (DiffKDDistiller, student_class), dict(__module__=__name__))
