"""What a distillation config will do, before anything is trained: no weights, no data."""

import copy
from contextlib import contextmanager
from math import ceil
from typing import Dict, Iterator, List, Optional, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmdiffkd.models.distillers.passes import passes
from mmdiffkd.models.distillers.probe import blank_sample
from mmdiffkd.models.distillers.taps import TapRecorder, flatten
from mmdiffkd.utils import PREFIX, QuickMeta, kept_bytes, resolve_config, skeleton, with_preprocessor

from .build import build_distiller, read_config
from .distill_text import distill_text
from .dry_training import try_training_taps
from .image_size import Size, image_size

# of a parameter in float32: its weight alone, and with gradient and momentum of SGD
WEIGHT_BYTES = dict(teacher=4, diffusion_part=12)
UNTRIED = 'The student does not run on random images here, so its taps were not tried in a training pass.'


@contextmanager
def _one_thread() -> Iterator[None]:
    """On small images several threads wait for each other longer than they compute, and spin all the while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def preview(config: Union[str, Config], cfg_options: Optional[dict] = None, size: Optional[Size] = None) -> dict:
    """Tell what a config distils, and what that takes.

    Args:
        config (str or Config): Path of the config, or a config at hand.
        cfg_options (dict, optional): Overrides, as on the command line.
        size (tuple[int, int], optional): Height and width of the images. None takes what the student trains on:
            what its preprocessor, ``image_size`` of the config or the training pipeline says, else what is usual for
            the package. Defaults to None.

    Returns:
        dict: ``size``; ``pairs``, a dict for every pair and level; ``parameters`` of ``student``, ``teacher`` and
        ``diffusion_part``; their ``gflops`` for one image, a multiply-add counting as two: of the student's forward
        pass, of the teacher's as far as its last tap, of the diffusion part forward and backward, None where they
        cannot be counted; ``kept_mib`` of the diffusion part for the backward pass of one image; ``weights_mb``, of
        the teacher's weights, and of the diffusion part's with gradients and momentum of SGD; ``overhead``, operations
        of teacher and diffusion part over those of the student's step; ``distill``, what the defaults stand for, as
        text to paste; ``warnings``.

    Raises:
        ValueError: If the config distils nothing, or a tap gives nothing to distil while the student trains.
    """
    with torch.random.fork_rng(devices=[]):
        cfg, model = build_distiller(config, cfg_options)
    tried = try_training_taps(cfg, model)
    teacher = model.diffkd_teacher
    size = size or image_size(cfg)
    rows = _rows(model, size)
    part_gflops, kept = _count_part(model, rows)
    student_net, teacher_net = _skeleton(cfg.model.student, cfg), skeleton(teacher.model_cfg)
    gflops = dict(
        student=_count_pass(student_net, size),
        teacher=_count_pass(teacher_net, size, {path: info.calls for path, info in teacher.taps.items()}),
        diffusion_part=part_gflops,
    )
    student_parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(PREFIX))
    parameters = dict(
        student=student_parameters,
        teacher=sum(p.numel() for p in teacher_net.parameters()),
        diffusion_part=sum(p.numel() for p in model.diffkd.parameters()),
    )
    step = gflops['student'] and 3 * gflops['student']  # the backward pass takes twice the forward pass
    known = None not in gflops.values()
    return dict(
        size=list(size),
        pairs=rows,
        parameters=parameters,
        gflops=gflops,
        kept_mib=kept and kept / 2**20,
        weights_mb={part: number * parameters[part] / 1e6 for part, number in WEIGHT_BYTES.items()},
        overhead=(gflops['teacher'] + gflops['diffusion_part']) / step if known else None,
        distill=distill_text(model),
        warnings=_warnings(model, cfg, parameters) + ([] if tried else [UNTRIED]),
    )


@_one_thread()
def list_taps(
    config: Union[str, Config],
    owner: str = 'student',
    size: Optional[Size] = None,
    cfg_options: Optional[dict] = None,
) -> Dict[str, List[List[int]]]:
    """The modules of a model that can be tapped, with the shapes of what they return for one image.

    Args:
        config (str or Config): A config of a distillation, or of a plain model (``owner`` has no meaning then).
        owner (str): ``'student'`` or ``'teacher'``. Defaults to ``'student'``.
        size (tuple[int, int], optional): Height and width of the images. Defaults to None, as for :func:`preview`.
        cfg_options (dict, optional): Overrides, as on the command line.

    Returns:
        dict[str, list[list[int]]]: Shapes by path.

    Raises:
        ValueError: If there is no teacher.
        RuntimeError: If the model runs neither without memory nor on the CPU at that size.
    """
    cfg = read_config(config, cfg_options)
    size = size or image_size(cfg)
    if 'student' in cfg.model and owner == 'teacher':
        if not cfg.model.get('teacher'):
            raise ValueError(
                "The config has no teacher whose taps could be listed; list the student's, or set teacher."
            )
        cfg = resolve_config(cfg.model.teacher.config)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model_cfg = cfg.model.student if 'student' in cfg.model else cfg.model
    net = _skeleton(model_cfg, cfg)
    shapes: Dict[str, List[List[int]]] = {}

    def note(path):
        def hook(module, inputs, output):
            try:
                tensors = flatten(output, path)
            except ValueError:  # it returns something else
                return
            maps = [list(tensor.shape) for tensor in tensors if tensor is not None and tensor.dim() in (2, 3, 4)]
            if maps:
                shapes.setdefault(path, []).extend(maps)

        return hook

    for path, module in net.named_modules():
        if path:
            module.register_forward_hook(note(path))
    _run_longest(net, size)
    return {path: shapes[path] for path, _ in net.named_modules() if path in shapes}


def _skeleton(model_cfg: dict, cfg: Config) -> nn.Module:
    return skeleton(with_preprocessor(copy.deepcopy(model_cfg), cfg.get('data_preprocessor')))


def _rows(model: nn.Module, size: Size) -> List[dict]:
    rows = []
    for name, pair in model.pairs.items():
        ours, theirs = model._student_taps[pair.student], model.diffkd_teacher.taps[pair.teacher]
        neck = model.diffkd[name]
        for position, (s, t) in enumerate(model._matches[name]):
            level = neck.levels[min(position, len(neck.levels) - 1)]
            has_autoencoder = level.denoise and level.autoencoder is not None
            student, teacher = (
                [info.channels[i], *_grid(info.strides[i], size)] for info, i in ((ours, s), (theirs, t))
            )
            rows.append(
                dict(
                    pair=name,
                    level=s,
                    student_tap=pair.student,
                    student_shape=student,
                    teacher_tap=pair.teacher,
                    teacher_shape=teacher,
                    resized=student[1:] != teacher[1:],
                    adapter=_describe_conv(level.align),
                    latent_channels=None if not level.denoise else level.proj[0].out_channels,
                    autoencoder=has_autoencoder,
                    denoiser=type(level.denoiser).__name__ if level.denoise else None,
                    steps=level.schedule.timesteps if level.denoise else None,
                    distance=type(level.distance).__name__,
                    loss_weight=getattr(level.distance, 'loss_weight', None),
                    loss_diffusion_weight=level.loss_diffusion_weight if level.denoise else None,
                    loss_reconstruction_weight=level.loss_reconstruction_weight if has_autoencoder else None,
                )
            )
    return rows


def _grid(stride: Optional[float], size: Size) -> List[int]:
    return [1, 1] if stride is None else [ceil(side / stride) for side in size]


def _describe_conv(module: nn.Module) -> Optional[str]:
    return f'{module.in_channels} -> {module.out_channels}' if isinstance(module, nn.Conv2d) else None


def _count_pass(net: nn.Module, size: Size, stop_after: Optional[Dict[str, int]] = None) -> Optional[float]:
    """1e9 operations of a forward pass on one image; None if the model does not run on the meta device."""
    net.to('meta')  # what is not there yet was built from numbers
    with FlopCounterMode(display=False) as counter, QuickMeta():
        try:
            with TapRecorder(net, stop_after or (), 'teacher', stop_after=stop_after or None):
                _run_longest(net, size, shortest=bool(stop_after))
        except Exception:
            return None
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def _run_longest(net: nn.Module, size: Size, shortest: bool = False) -> None:
    """Run a model on a blank image by the longest, or the shortest, way that works."""
    device = next(net.parameters()).device
    images, samples = torch.zeros(1, 3, *size, device=device), [blank_sample(*size)]
    ways = list(passes(net.eval()).values())
    problem = None
    for way in ways if shortest else reversed(ways):
        try:
            way(images, samples)
            return
        except Exception as error:
            problem = error
    raise RuntimeError(f'{type(net).__name__} does not run at {size[0]}x{size[1]}: {problem}') from problem


def _count_part(model: nn.Module, rows: List[dict]) -> Tuple[Optional[float], Optional[int]]:
    """1e9 operations of the diffusion part, forward and backward, and the bytes it keeps, for one image."""
    necks = copy.deepcopy(model.diffkd).to('meta').train()

    losses: List[Tensor] = []

    def forward():
        for name, features in inputs.items():
            for output in necks[name](*features):
                losses.extend(output.losses.values())

    inputs = {}
    for row in rows:
        student, teacher = inputs.setdefault(row['pair'], ([], []))
        student.append(torch.empty(2, *row['student_shape'], device='meta', requires_grad=True))
        teacher.append(torch.empty(2, *row['teacher_shape'], device='meta'))
    there: List[Tensor] = [*necks.parameters(), *(x for pair in inputs.values() for levels in pair for x in levels)]
    try:
        with FlopCounterMode(display=False) as counter, QuickMeta():
            kept = kept_bytes(forward, there)
            sum(losses).backward()
        return counter.get_total_flops() / 2e9, kept // 2
    except Exception:  # a distance that looks at numbers, say
        return None, None


def _warnings(model: nn.Module, cfg: Config, parameters: Dict[str, int]) -> List[str]:
    found = []
    teacher = model.diffkd_teacher
    if parameters['teacher'] <= parameters['student']:
        found.append(
            f'The teacher has {parameters["teacher"] / 1e6:.1f} M parameters, no more than the student with '
            f'{parameters["student"] / 1e6:.1f} M.'
        )
    if teacher.renormalise.student != teacher.renormalise.teacher:
        found.append("The teacher's normalisation is another: it sees the student's images converted to its own.")
    classes = [_num_classes(model_cfg) for model_cfg in (cfg.model.student, teacher.model_cfg)]
    for name in _comparing_classes(model, *classes):
        found.append(
            f'distill.{name} compares class scores, but the student knows {classes[0]} classes, the teacher '
            f'{classes[1]}: distil features, not logits.'
        )
    if not teacher.checkpoint:
        found.append('teacher.checkpoint is missing: training would stop at once.')
    return found


def _comparing_classes(model: nn.Module, ours: Optional[int], theirs: Optional[int]) -> List[str]:
    """The pairs that compare scores of other classes: layers of heads whose widths go with the numbers of classes."""
    if ours is None or theirs is None or ours == theirs:
        return []
    taps = model._student_taps, model.diffkd_teacher.taps
    found = []
    for name, pair in model.pairs.items():
        widths = [
            (taps[0][pair.student].channels[s], taps[1][pair.teacher].channels[t]) for s, t in model._matches[name]
        ]
        if 'head' in pair.student and any(s != t and s % ours == t % theirs == 0 for s, t in widths):
            found.append(name)
    return found


def _num_classes(model_cfg: dict) -> Optional[int]:
    roi_head = model_cfg.get('roi_head') or {}
    for head in (*(model_cfg.get(name) for name in ('bbox_head', 'decode_head', 'head')), roi_head.get('bbox_head')):
        last = head[-1] if isinstance(head, (list, tuple)) else head  # of a cascade
        if isinstance(last, dict) and 'num_classes' in last:
            return last['num_classes']
    return None
