"""Inspect a distillation config before training, without loading weights or data."""

import copy
import os.path as osp
import re
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdiffkd.engine.checkpoint import PREFIX
from mmdiffkd.models import DiffKDDistiller, DistillContext
from mmdiffkd.models.distillers.auto_weight import AUTO
from mmdiffkd.models.distillers.batches import blank_sample
from mmdiffkd.models.distillers.feature_info import (
    FeatureInfo,
    check_gradient,
    check_training_outputs,
    forward_fns,
)
from mmdiffkd.models.distillers.input_renormalizer import COLOR_FLAGS
from mmdiffkd.models.distillers.recorders import ModuleInputsRecorder, ModuleOutputsRecorder, is_roi_tap
from mmdiffkd.models.distillers.teacher import Teacher
from mmdiffkd.models.encoders import PRETRAINED, is_encoder
from mmdiffkd.models.feature_maps import TapError, flatten
from mmdiffkd.utils import read_config
from mmdiffkd.utils.config import (
    CONFIG_SUFFIXES,
    get_model_cfg,
    get_teacher_cfg,
    package_of,
    resolve_config,
    with_preprocessor,
)
from mmdiffkd.utils.dummy_inputs import fit_to, random_batch, without_pretrained
from mmdiffkd.utils.image_settings import Size, image_channels, image_size, loaded_order, pipeline_normalization
from mmdiffkd.utils.meta_device import (
    MultiplyAddCounter,
    QuickInit,
    QuickMeta,
    build_for_inspection,
    build_on_cpu,
    saved_activation_bytes,
)
from mmdiffkd.utils.model_index import zoo_checkpoint

from .build import build_distiller
from .distill_to_text import distill_to_text

# bytes per parameter in float32: the teacher needs only the weight, the diffusion module also gradient and momentum
WEIGHT_BYTES = dict(teacher=4, diffusion_module=12)
UNTRIED = 'The student does not run on random images here, so its taps were not checked in a training pass.'


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use a single CPU thread. On small images, several threads would spend most of the time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def preview(
    config: Union[str, Config],
    cfg_options: Optional[dict] = None,
    size: Optional[Size] = None,
    preset: Optional[str] = None,
) -> dict:
    """Report the features that a config distills and the cost of the distillation.

    Args:
        config (str or Config): Path of the config, or a loaded config.
        cfg_options (dict, optional): Overrides, as on the command line.
        size (tuple[int, int], optional): Height and width of the images. None uses the size of the training images,
            see ``mmdiffkd.utils.image_settings.image_size``. Defaults to None.
        preset (str, optional): Method to preview instead of ``preset`` and ``distill`` of the config; see
            :func:`list_presets`. Defaults to None.

    Returns:
        dict: The report:

        * ``size``: height and width of the images.
        * ``pairs``: one dict per pair, tap and level.
        * ``classes``: one dict for each pair that compares only some classes, by name of the pair. It lists the
          ``shared`` classes, and the classes of the ``student`` and of the ``teacher`` that are left out.
        * ``parameters``: number of parameters of ``student``, ``teacher`` and ``diffusion_module``.
        * ``gmacs``: multiply-adds per image in units of 1e9: of the student's forward pass, of the teacher's forward
          pass up to the last tap, and of the diffusion module's forward and backward pass; None if unknown.
        * ``kept_mib``: MiB that the diffusion module saves for the backward pass per image; None if unknown.
        * ``weights_mb``: MB of the teacher's weights, and of the diffusion module's weights, gradients and momentum of
          SGD.
        * ``overhead``: multiply-adds of teacher and diffusion module, divided by those of the student's training step;
          None if unknown.
        * ``distill``: the pairs as config text, including default settings.
        * ``untrained``: with ``task_loss=False``, modules of the student that are frozen because no compared feature
          depends on them.
        * ``warnings``: list of messages.

    Raises:
        ValueError: If the config is not a distillation config, or a tap cannot be distilled in training.
    """
    with torch.random.fork_rng(devices=[]):
        if preset is not None:
            config, cfg_options = read_config(config, cfg_options), None
            config.model.pop('distill', None)
            config.model.preset = preset
        cfg, model = build_distiller(config, cfg_options)
    tried = check_training_pass(cfg, model)
    teacher = model.diffkd_teacher
    size = size or image_size(cfg)
    rows = _rows(model, size)
    part_gmacs, kept = _count_diffusion_module(model, rows)
    student_net, teacher_net = _build_for_inspection(cfg.model.student, cfg), build_for_inspection(teacher.model_cfg)
    gmacs = dict(
        student=_count_pass(student_net, size, _channels(model.student_info)),
        teacher=_count_pass(
            teacher_net,
            teacher.input_size(size),
            _channels(teacher.taps),
            {path: info.calls for path, info in teacher.taps.items()},
        ),
        diffusion_module=part_gmacs,
    )
    student_parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(PREFIX))
    parameters = dict(
        student=student_parameters,
        teacher=sum(p.numel() for p in teacher_net.parameters()),
        diffusion_module=sum(p.numel() for p in model.diffkd.parameters()),
    )
    step = gmacs['student'] and 3 * gmacs['student']  # a backward pass costs about two forward passes
    known = None not in gmacs.values()
    return dict(
        size=list(size),
        pairs=rows,
        classes={
            name: dict(shared=match.names, student=match.left_out[0], teacher=match.left_out[1])
            for name, match in model.class_matches.items()
        },
        parameters=parameters,
        gmacs=gmacs,
        kept_mib=kept and kept / 2**20,
        weights_mb={part: number * parameters[part] / 1e6 for part, number in WEIGHT_BYTES.items()},
        overhead=(gmacs['teacher'] + gmacs['diffusion_module']) / step if known else None,
        distill=distill_to_text(model),
        untrained=model.untrained,
        warnings=[
            *_warnings(model, cfg, parameters),
            *_resize_notes(teacher, size),
            *_size_warnings(gmacs['teacher'], teacher, teacher_net, size),
            *([] if tried else [UNTRIED]),
        ],
    )


@_one_thread()
def list_taps(
    config: Union[str, Config],
    owner: str = 'student',
    size: Optional[Size] = None,
    cfg_options: Optional[dict] = None,
) -> Dict[str, List[List[int]]]:
    """List the modules of a model that can be tapped, with their output shapes for one image.

    Args:
        config (str or Config): Config of a distillation or of a plain model.
        owner (str): ``'student'`` or ``'teacher'``; ignored for a plain model. Defaults to ``'student'``.
        size (tuple[int, int], optional): Height and width of the images. None uses the size of the training images, as
            :func:`preview` does. For a teacher of timm, torchvision or transformers, this is the size of its own
            training. Defaults to None.
        cfg_options (dict, optional): Overrides, as on the command line.

    Returns:
        dict[str, list[list[int]]]: Output shapes by module path.

    Raises:
        ValueError: If ``owner`` is ``'teacher'`` and the config has no teacher.
        ValueError: If the model does not run at this image size.
    """
    cfg, given = read_config(config, cfg_options), size
    size = size or image_size(cfg)
    if 'student' in cfg.model and owner == 'teacher':
        if not cfg.model.get('teacher'):
            raise ValueError('The config has no teacher: set model.teacher, or use --list-taps student.')
        scope, cfg = package_of(cfg), resolve_config(cfg.model.teacher.config)
        init_default_scope(package_of(cfg) or scope or 'mmengine')
        model_cfg = get_teacher_cfg(cfg)
        if is_encoder(model_cfg):  # some encoders accept only one image size: use that of the teacher
            size = given or image_size(cfg)
    else:
        init_default_scope(package_of(cfg) or 'mmengine')
        model_cfg = copy.deepcopy(cfg.model.student if 'student' in cfg.model else cfg.model)
        model_cfg = with_preprocessor(model_cfg, cfg.get('data_preprocessor'))
    with suppress(ValueError):
        return _output_shapes(build_for_inspection(model_cfg), size, image_channels(model_cfg))
    # try again on the CPU: this is slower, but some operators do not support the meta device
    return _output_shapes(build_on_cpu(model_cfg), size, image_channels(model_cfg))


def _output_shapes(net: nn.Module, size: Size, channels: Sequence[int]) -> Dict[str, List[List[int]]]:
    """Run a model on one image, and return the shapes of the outputs of its modules."""
    shapes: Dict[str, List[List[int]]] = {}

    def note(path):
        def hook(module, inputs, output):
            try:
                tensors = flatten(output, path)
            except ValueError:  # the module does not return tensors, so it cannot be tapped
                return
            maps = [list(tensor.shape) for tensor in tensors if tensor is not None and tensor.dim() in (2, 3, 4)]
            if maps:
                shapes.setdefault(path, []).extend(maps)

        return hook

    for path, module in net.named_modules():
        if path:
            module.register_forward_hook(note(path))
    _run_longest(net, size, channels)
    return {path: shapes[path] for path, _ in net.named_modules() if path in shapes}


def _build_for_inspection(model_cfg: dict, cfg: Config) -> nn.Module:
    return build_for_inspection(with_preprocessor(copy.deepcopy(model_cfg), cfg.get('data_preprocessor')))


def _rows(model: nn.Module, size: Size) -> List[dict]:
    """Return one row per pair, tap and level: taps, shapes and the settings of the neck."""
    rows = []
    for name, pair in model.pairs.items():
        settings = model.diffkd[name].describe()
        if name in model.auto_weights:
            settings = [dict(level, loss_weight=AUTO) for level in settings]
        compared = zip(pair.student_taps, pair.teacher_taps, model.compared_info(name), model.matched_levels[name])
        for student_tap, teacher_tap, infos, matches in compared:
            for position, levels in enumerate(matches):
                student, teacher = ([info.channels[i], *_grid(info.strides[i], size)] for info, i in zip(infos, levels))
                rows.append(
                    dict(
                        pair=name,
                        level=levels[0],
                        student_tap=student_tap,
                        student_shape=student,
                        teacher_tap=teacher_tap,
                        teacher_shape=teacher,
                        resized=student[1:] != teacher[1:],
                        **settings[min(position, len(settings) - 1)],
                    )
                )
    return rows


def _channels(infos: Dict[str, FeatureInfo]) -> int:
    """Return the number of channels of a model's images."""
    return next(iter(infos.values())).image_channels


def _grid(stride: Optional[float], size: Size) -> List[int]:
    return [1, 1] if stride is None else [ceil(side / stride) for side in size]


def _count_pass(
    net: nn.Module, size: Size, channels: int, stop_after: Optional[Dict[str, int]] = None
) -> Optional[float]:
    """Return the multiply-adds of a forward pass on one image in units of 1e9, or None if they cannot be counted."""
    net.to('meta')  # move models that had to be built on the CPU
    with MultiplyAddCounter() as counter, QuickMeta():
        try:
            with ModuleOutputsRecorder(net, stop_after or (), 'teacher', stop_after=stop_after or None):
                _run_longest(net, size, [channels], shortest=bool(stop_after))
        except Exception:
            return None
    return counter.total / 1e9


@torch.no_grad()
def _run_longest(net: nn.Module, size: Size, channels: Sequence[int], shortest: bool = False) -> None:
    """Run a model on a blank image with the forward function that runs most modules, or fewest if ``shortest``.

    The image has the first number of channels in ``channels`` that the model accepts.
    """
    device = next(net.parameters()).device
    net.eval()
    functions = list(forward_fns(net).values())
    problem = None
    for forward_fn in functions if shortest else reversed(functions):
        for width in channels:
            try:
                forward_fn(torch.zeros(1, width, *size, device=device), [blank_sample(*size)])
                return
            except Exception as error:
                problem = problem or error
    raise ValueError(f'{type(net).__name__} does not run at {size[0]}x{size[1]}: {problem}') from problem


def _count_diffusion_module(model: nn.Module, rows: List[dict]) -> Tuple[Optional[float], Optional[int]]:
    """Return multiply-adds (1e9, forward and backward) and saved bytes of the diffusion module, both per image."""
    necks = copy.deepcopy(model.diffkd).train()
    if _checkpoint_runs_on_meta():
        return _count_necks(_without_values(necks, 'meta'), 'meta', model, rows)
    with FakeTensorMode():  # slower than the meta device
        return _count_necks(_without_values(necks, 'cpu'), 'cpu', model, rows)


def _count_necks(
    necks: nn.Module, device: str, model: nn.Module, rows: List[dict]
) -> Tuple[Optional[float], Optional[int]]:
    losses: List[Tensor] = []

    def forward():
        for name, (student, teacher) in inputs.items():
            for output in necks[name](student, teacher, context):
                losses.extend(output.losses.values())

    samples = [SimpleNamespace(gt_label=torch.zeros(1, dtype=torch.long, device=device))] * 2
    context = DistillContext(student=model, data_samples=samples)
    inputs = {}
    for name, pair in model.pairs.items():
        sides = [], []
        for tap in pair.student_taps:
            of_tap = [row for row in rows if (row['pair'], row['student_tap']) == (name, tap)]
            student = [torch.empty(2, *row['student_shape'], device=device, requires_grad=True) for row in of_tap]
            teacher = [torch.empty(2, *row['teacher_shape'], device=device) for row in of_tap]
            sides[0].append(student)
            sides[1].append(teacher)
        inputs[name] = sides if len(pair.student_taps) > 1 else (sides[0][0], sides[1][0])
    not_saved: List[Tensor] = [*necks.parameters(), *_tensors(inputs)]
    try:
        with MultiplyAddCounter() as counter, QuickMeta():
            kept = saved_activation_bytes(forward, ignore=not_saved)
            sum(losses).backward()
        return counter.total / 2e9, kept // 2
    except Exception:  # for example, a custom distance reads tensor values, which these tensors do not have
        return None, None


def _checkpoint_runs_on_meta() -> bool:
    """Return whether activation checkpointing runs on the meta device. It does not in torch 2.5."""
    try:
        with torch.random.fork_rng(devices=[], device_type='meta'):
            return True
    except RuntimeError:
        return False


def _without_values(module: nn.Module, device: str) -> nn.Module:
    """Replace the tensors of a module by empty ones, which are fake tensors under ``FakeTensorMode``."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return module


def _tensors(value) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    else:
        for member in value.values() if isinstance(value, dict) else value:
            yield from _tensors(member)


def _warnings(model: nn.Module, cfg: Config, parameters: Dict[str, int]) -> List[str]:
    found = []
    teacher = model.diffkd_teacher
    if parameters['teacher'] <= parameters['student']:
        found.append(
            f'The teacher has {parameters["teacher"] / 1e6:.1f} M parameters, no more than the student '
            f'({parameters["student"] / 1e6:.1f} M).'
        )
    if not teacher.renormalize.is_identity:
        found.append("The teacher normalizes images differently: the student's images are converted for it.")
    found += teacher.renormalize.notes
    found += _loader_warnings(teacher, cfg)
    classes = [_num_classes(model_cfg) for model_cfg in (cfg.model.student, teacher.model_cfg)]
    for name in _pairs_with_class_mismatch(model, *classes):
        found.append(
            f'distill.{name} compares class scores, but the student has {classes[0]} classes and the teacher '
            f'{classes[1]}: distill features, not logits.'
        )
    problem = checkpoint_problem(teacher)
    if problem:
        found.append(f'{problem}: training would stop before the first iteration.')
    return found


def _resize_notes(teacher: Teacher, size: Size) -> List[str]:
    """Return a note if the teacher gets images of a different size than the student."""
    wanted = teacher.input_size(size)
    if teacher.resizer is None or wanted == tuple(size):
        return []
    multiple = teacher.resizer.divisor
    reason = f', the nearest multiples of {multiple} pixels' if multiple and not teacher.resize else ''
    return [f'Images of {size[0]}x{size[1]} are resized for the teacher to {wanted[0]}x{wanted[1]}{reason}.']


def checkpoint_problem(teacher: Teacher) -> Optional[str]:
    """Return the problem of ``teacher.checkpoint``, or None. The file is neither read nor downloaded."""
    if not teacher.checkpoint:
        return 'teacher.checkpoint is missing'
    path = str(teacher.checkpoint)
    if path == PRETRAINED:
        return None
    if path == 'zoo':
        try:
            zoo_checkpoint(teacher.source)
        except ValueError as error:
            return str(error).rstrip('.')
        return None
    # a URL, or a path with a scheme such as 'name:'; a single letter before the colon is a drive of Windows
    if '://' in path or re.match(r'\w\w+:', path):
        return None
    name = f"teacher.checkpoint='{path}'"
    if osp.isdir(path):
        return f'{name} is a folder'
    if not osp.exists(path):
        return f'{name} does not exist (working directory: {osp.abspath(".")})'
    return f'{name} is a config, not a checkpoint' if Path(path).suffix in CONFIG_SUFFIXES else None


def _loader_warnings(teacher: Teacher, cfg: Config) -> List[str]:
    """Warn of data pipelines whose color order or normalization does not fit the preprocessors of the models."""
    found, renormalize = [], teacher.renormalize
    orders = loaded_order(cfg), loaded_order(teacher.cfg)
    is_given = bool({'type', *COLOR_FLAGS} & set(teacher.preprocessor_changes))
    if None in orders or is_given:
        found += filter(None, [renormalize.color_note])
    elif orders[0] != orders[1]:
        found.append(
            f"The student's data set gives {orders[0]} images and the teacher's {orders[1]}: set "
            f'{renormalize.color_override()}, so that the teacher gets the colors it was trained on.'
        )
    pipeline = pipeline_normalization(cfg)
    if pipeline and not {'type', 'mean'} & set(teacher.preprocessor_changes):
        override = renormalize.override_for(pipeline, pipeline_normalization(teacher.cfg))
        if override:
            found.append(
                f"The student's pipeline normalizes images, so the teacher gets normalized images: set {override}, so "
                'that they are normalized as in its training.'
            )
    return found


def _size_warnings(gmacs: Optional[float], teacher: Teacher, net: nn.Module, size: Size) -> List[str]:
    """Warn of a teacher that does not run on images of this size, such as a transformer with a fixed image size."""
    if gmacs is not None:
        return []
    calls = {path: info.calls for path, info in teacher.taps.items()}
    own_size = (teacher.model_cfg.get('backbone') or {}).get('img_size') or 512
    own_size = tuple(own_size) if isinstance(own_size, (list, tuple)) else (own_size, own_size)
    # if the teacher fails at its own size as well, its operators do not support the meta device
    if _count_pass(net, own_size, _channels(teacher.taps), calls) is None:
        return []
    height, width = teacher.input_size(size)
    return [
        f'The teacher does not run on images of {height}x{width}, but on images of {own_size[0]}x{own_size[1]}: change '
        "the size in the student's pipeline, or choose another teacher."
    ]


def _pairs_with_class_mismatch(model: nn.Module, ours: Optional[int], theirs: Optional[int]) -> List[str]:
    """Find pairs that compare class scores, although student and teacher have different numbers of classes."""
    if ours is None or theirs is None or ours == theirs:
        return []
    found = {}
    for name, pair in model.pairs.items():
        for student_tap, infos, matches in zip(
            pair.student_taps, model.compared_info(name), model.matched_levels[name]
        ):
            widths = [(infos[0].channels[s], infos[1].channels[t]) for s, t in matches]
            # a layer of a head returns class scores if its number of channels is a multiple of num_classes
            if 'head' in student_tap and any(s != t and s % ours == t % theirs == 0 for s, t in widths):
                found[name] = None
    return list(found)


def _num_classes(model_cfg: dict) -> Optional[int]:
    roi_head = model_cfg.get('roi_head') or {}
    for head in (*(model_cfg.get(name) for name in ('bbox_head', 'decode_head', 'head')), roi_head.get('bbox_head')):
        last = head[-1] if isinstance(head, (list, tuple)) else head  # in a cascade, the last head predicts the result
        if isinstance(last, dict) and 'num_classes' in last:
            return last['num_classes']
    return None


SIZES = (128, 224)  # image sizes, tried in turn: some models do not accept small images


def check_training_pass(cfg: Config, model: DiffKDDistiller) -> bool:
    """Run the student's training pass on random images, and check that its taps can be distilled.

    Args:
        cfg (Config): Config of the distillation.
        model (DiffKDDistiller): Distiller built from the config.

    Returns:
        bool: True if the check passed, False if the student does not run on random images.

    Raises:
        TapError: If, in training, a tap is not called, returns different outputs, or gets no gradient.
    """
    plain = Config(dict(cfg.to_dict(), model=copy.deepcopy(cfg.model.student.to_dict())))
    without_pretrained(plain.model)
    # a preprocessor may change the number of channels
    widths = dict.fromkeys([_channels(model.student_info), 3])
    for size, width in product(SIZES, widths):
        try:
            with torch.random.fork_rng(devices=[]), _first_iteration():
                recorder, images = _record_training_pass(plain, model, size, width)
        except TapError:
            raise
        except Exception:
            continue  # the image may be too small, or an operator needs a GPU; training shows real errors
        for name, pair in model.pairs.items():
            for tap, matches in zip(pair.student_taps, model.matched_levels[name]):
                info = model.student_info[tap]
                outputs = recorder.passes(tap, info.calls, all(info.requires_grad))[0]
                check_training_outputs(name, tap, outputs, info)
                features = recorder.as_maps(tap, outputs, images.shape[-2:], info.tokens)
                check_gradient(name, tap, features, [s for s, _ in matches])
        return True
    return False


def _record_training_pass(plain: Config, model: DiffKDDistiller, size: int, channels: int):
    """Run a training pass. Return the recorder of the student's taps, and the input images of its encoder."""
    torch.default_generator.manual_seed(0)
    with QuickInit(), _silent_log():  # init_weights() logs every parameter
        student = revert_sync_batchnorm(MODELS.build(fit_to(get_model_cfg(plain), size)))
        student.init_weights()  # before this call, some parameters are uninitialized memory
    student.train()
    recorder = ModuleOutputsRecorder(student, model.student_info, 'student')
    data = student.data_preprocessor(random_batch(plain, size, channels=channels), True)
    views = ModuleInputsRecorder(student, model.encoder_path) if model.encoder_path else nullcontext()
    with recorder, views as encoder:
        if model.task_loss or any(map(is_roi_tap, model.student_info)):
            student(**data, mode='loss')
        else:
            model.run_to_taps(student, (), data)
    return recorder, model.find_images((), data, encoder)


@contextmanager
def _silent_log():
    logger = MMLogger.get_current_instance()
    handlers, logger.handlers = logger.handlers, []
    try:
        yield
    finally:
        logger.handlers = handlers


@contextmanager
def _first_iteration():
    """Set iteration and epoch to 0 in the message hub, where some preprocessors read them."""
    info = MessageHub.get_current_instance().runtime_info
    before = dict(info)
    info.update(iter=0, epoch=0)
    try:
        yield
    finally:
        info.clear()
        info.update(before)
