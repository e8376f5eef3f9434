from typing import Dict, List, NamedTuple, Optional

from torch import nn

from mmdiffkd.utils import nearest

from ..necks import FeatureDiffusionNeck
from .defaults import default_distill

# The paper's weights of the feature distance; its rule is to choose a weight so that the loss is about Faster R-CNN's.
FEATURE_LOSS_WEIGHTS = dict(RepPointsDetector=15.0)
DEFAULT_FEATURE_LOSS_WEIGHT = 5.0
# parts of models that optimizer settings name; upstream looks for the words anywhere in a parameter's name
PARTS = ('backbone', 'neck', 'head')
FIELDS = ('student', 'teacher', 'levels', 'neck')
# what necks that denoise are given where a config does not say
PRESETS = dict(paper={}, plus=dict(backprop_steps=1))


class Pair(NamedTuple):
    """A tap of the student, its counterpart in the teacher, and how they are compared.

    Attributes:
        student (str): Path of the student's module.
        teacher (str): Path of the teacher's module.
        levels (list[int], optional): Student levels; None for all that both have.
        neck (dict): Config of the neck, without its widths.
    """

    student: str
    teacher: str
    levels: Optional[List[int]]
    neck: dict


def read_pairs(
    distill: Optional[dict], student: nn.Module, student_cfg: dict, teacher_cfg: dict, preset: str = 'paper'
) -> Dict[str, Pair]:
    """Complete the ``distill`` of a config.

    Without it, :func:`default_distill` decides. A pair of one of its names that leaves out taps takes the default ones,
    and those parts of the neck that it does not name: ``dict(feat=dict(neck=dict(latent_channels=768)), logits={})``.
    Where there is one default pair, a pair of another name takes its taps, too: the paper's of detectors are from neck
    to neck.

    Args:
        distill (dict, optional): ``{name: dict(student=, teacher=, levels=, neck=)}``.
        student (nn.Module): The student.
        student_cfg (dict): Its config.
        teacher_cfg (dict): Config of the teacher.
        preset (str): ``'paper'``, or ``'plus'``, with which the distance sends its gradient through the last denoising
            step alone and :func:`default_distill` has more pairs. Defaults to ``'paper'``.

    Returns:
        dict[str, Pair]: The pairs by name.

    Raises:
        ValueError: If it is empty, a pair is misspelt or incomplete, or there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no preset='{preset}'; there are {', '.join(PRESETS)}.")
    if distill is not None and (not isinstance(distill, dict) or not distill):
        raise ValueError(
            'distill is empty: leave it out for the default pair, or name pairs such as '
            "distill=dict(fpn=dict(student='neck', teacher='neck'))."
        )
    for name, cfg in (distill or {}).items():
        _check_pair(name, cfg)
    if distill is None:
        distill = default_distill(student, student_cfg, teacher_cfg, preset)
    elif any(not (cfg.get('student') and cfg.get('teacher')) for cfg in distill.values()):
        defaults = default_distill(student, student_cfg, teacher_cfg, preset)
        papers = defaults if preset == 'paper' else default_distill(student, student_cfg, teacher_cfg)
        distill = {name: _completed(name, cfg, defaults, papers) for name, cfg in distill.items()}
    return {name: _read_pair(cfg, student_cfg, preset) for name, cfg in distill.items()}


def _completed(name: str, cfg: dict, defaults: Dict[str, dict], papers: Dict[str, dict]) -> dict:
    """A pair with the default taps where it names none, and the default neck where it has a default pair's name."""
    if cfg.get('student') and cfg.get('teacher'):
        return cfg
    default = defaults.get(name, papers.get(name))  # plus may leave one of the paper's out
    if default is None:
        if len(defaults) > 1:
            raise ValueError(
                f'distill.{name} names no tap and is no default pair: those are {", ".join(defaults)}. Name its taps: '
                f"distill=dict({name}=dict(student='backbone', teacher='backbone'))."
            )
        (default,) = defaults.values()
        default = dict(default, neck={})
    neck, default_neck = cfg.get('neck') or {}, default.get('neck') or {}
    if default_neck.get('denoise', True) and not neck.get('denoise', True):  # what is left: an adapter and a distance
        default_neck = {key: value for key, value in default_neck.items() if key == 'distance'}
    return {**default, **cfg, 'neck': {**default_neck, **neck}}


def _check_pair(name: str, cfg: dict) -> None:
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or 'loss' in name:
        raise ValueError(
            f"The pair name '{name}' cannot be used: it becomes part of checkpoint keys and of log keys, where 'loss' "
            "marks what is summed up; take a plain word such as 'fpn'."
        )
    for part in PARTS:
        if part in name:
            raise ValueError(
                f"The pair name '{name}' contains '{part}': optimizer settings for that part of a model (custom_keys) "
                "would take the diffusion part for it; take another word such as 'feat' or 'logits'."
            )
    if not isinstance(cfg, dict):
        raise ValueError(f"distill.{name}={cfg!r} must be a dict such as dict(student='neck', teacher='neck').")
    for field in cfg:
        if field not in FIELDS:
            raise ValueError(f"distill.{name} has no field '{field}'; the nearest are {nearest(field, FIELDS)}.")


def _read_pair(cfg: dict, student_cfg: dict, preset: str) -> Pair:
    neck, levels = dict(cfg.get('neck') or {}), cfg.get('levels')
    neck.setdefault('type', 'mmdiffkd.FeatureDiffusionNeck')
    if neck['type'] in ('mmdiffkd.FeatureDiffusionNeck', FeatureDiffusionNeck) and neck.get('denoise', True):
        neck = {**PRESETS[preset], **neck}
    neck.setdefault('distance', dict(type='mmdiffkd.MSELoss', loss_weight=_default_weight(student_cfg)))
    return Pair(cfg['student'], cfg['teacher'], [levels] if isinstance(levels, int) else levels, neck)


def _default_weight(student_cfg: dict) -> float:
    detector = str(student_cfg['type']).split('.')[-1]
    return FEATURE_LOSS_WEIGHTS.get(detector, DEFAULT_FEATURE_LOSS_WEIGHT)
