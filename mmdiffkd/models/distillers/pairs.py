"""Read the pairs of a config. A pair consists of a student tap, a teacher tap and the neck that compares them."""

import inspect
from typing import Dict, List, Literal, NamedTuple, Optional, Sequence, Union

from torch import nn

from mmdiffkd.registry import MODELS, PRESETS
from mmdiffkd.utils.check_config import check_value, closest_names, get_class
from mmdiffkd.utils.config import comparable, type_name

from ..diffusion.feature_diffusion import FeatureDiffusion
from ..encoders import is_encoder
from ..necks.feature_diffusion_neck import FeatureDiffusionNeck
from .classes import ClassMatcher
from .recorders import is_roi_tap

# keys that must have the same values in both box heads, because otherwise their outputs have different meanings
COMPARABLE = ('bbox_coder', 'reg_class_agnostic', 'num_classes')
# Words that pair names must not contain: optimizer settings often use them as keys of custom_keys, which match anywhere
# in a parameter's name.
PARTS = ('backbone', 'neck', 'head')
FIELDS = dict(
    student=Union[str, Sequence[str], None],
    teacher=Union[str, Sequence[str], None],
    levels=Union[int, Sequence[int], Literal['nearest'], None],
    neck=Optional[dict],
    classes=Optional[dict],
)
PRESET_MEMBERS = ('neck_defaults', 'default_pairs', 'known_pairs', 'default_distance')
RENAMED_PRESETS = dict(paper='diffkd')


class Pair(NamedTuple):
    """Taps of student and teacher, and the neck that compares them.

    Attributes:
        student (str or list[str]): Path of the student's module, or several paths for a neck that takes several taps.
        teacher (str or list[str]): Path of the teacher's module, or the same number of paths.
        levels (list[int] or str, optional): Student levels to distill, ``'nearest'``, or None; see
            ``match_levels``.
        neck (dict): Config of the neck, without the numbers of channels.
        classes (dict, optional): ``{student class: teacher class}`` for class scores; see :meth:`.ClassMatcher.match`.
    """

    student: Union[str, List[str]]
    teacher: Union[str, List[str]]
    levels: Union[List[int], str, None]
    neck: dict
    classes: Optional[dict] = None

    @property
    def student_taps(self) -> List[str]:
        """Paths of the pair's taps in the student."""
        return [self.student] if isinstance(self.student, str) else self.student

    @property
    def teacher_taps(self) -> List[str]:
        """Paths of the pair's taps in the teacher, in the same order as ``student_taps``."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher


def read_pairs(
    distill: Optional[dict],
    student: nn.Module,
    student_cfg: dict,
    teacher_cfg: dict,
    preset: Optional[str] = None,
    class_matcher: Optional[ClassMatcher] = None,
) -> Dict[str, Pair]:
    """Return the pairs of a config, with defaults for all settings that the config leaves out.

    If ``distill`` is None, the pairs are the default pairs of the preset. If a pair has the name of a default pair, all
    taps and neck settings that its config leaves out are those of the default pair. An example is
    ``dict(feat=dict(neck=dict(latent_channels=768)), logits={})``. If the preset has exactly one default pair, a pair
    with a different name may leave out one of its two taps, which is then the tap of the default pair.

    Args:
        distill (dict, optional): ``{name: dict(student=, teacher=, levels=, neck=, classes=)}``.
        student (nn.Module): The student.
        student_cfg (dict): Config of the student.
        teacher_cfg (dict): Config of the teacher.
        preset (str, optional): Name of a registered preset, such as ``'diffkd'`` or ``'cwd'``. Defaults to None:
            ``'cosine'`` for a teacher that is only an image encoder, ``'diffkd'`` for all others.
        class_matcher (ClassMatcher, optional): Matcher that knows the class names of student and teacher. None means
            that no class names are known. Defaults to None.

    Returns:
        dict[str, Pair]: The pairs by name.

    Raises:
        ValueError: If ``distill`` is empty, if a pair has unknown keys or no taps, or if the preset is unknown, is
            incomplete or does not fit the models.
    """
    check_value('preset', preset, Optional[str])
    PRESETS.import_from_location()
    chosen = _get_preset(preset or default_preset(teacher_cfg))
    models = student, student_cfg, teacher_cfg
    check_value('distill', distill, Optional[dict])
    if distill is not None and not distill:
        raise ValueError(
            'distill is empty: remove it to distill the default pairs, or define pairs, such as '
            "distill=dict(fpn=dict(student='neck', teacher='neck'))."
        )
    for name, cfg in (distill or {}).items():
        _check_pair(name, cfg)
    mapping = next((cfg['classes'] for cfg in (distill or {}).values() if cfg.get('classes')), None)
    chosen.class_matcher = ClassMatcher(*(class_matcher or ClassMatcher()).names, mapping)
    if distill is None:
        distill = chosen.default_pairs(*models)
    # treat fields that are None as not set
    distill = {name: {key: value for key, value in cfg.items() if value is not None} for name, cfg in distill.items()}
    if any(not (cfg.get('student') and cfg.get('teacher')) for cfg in distill.values()):
        defaults, known = chosen.default_pairs(*models), chosen.known_pairs(*models)
        distill = {name: _completed(name, cfg, defaults, known) for name, cfg in distill.items()}
    return {name: _read_pair(cfg, student_cfg, chosen) for name, cfg in distill.items()}


def _get_preset(name: str):
    """Build the preset with this name."""
    preset = PRESETS.get(name)
    if name in RENAMED_PRESETS:
        raise ValueError(f"There is no preset='{name}': the preset is called '{RENAMED_PRESETS[name]}' now.")
    if preset is None:
        nearest = closest_names(name, PRESETS.module_dict)
        raise ValueError(
            f"There is no preset='{name}'; the nearest are {nearest}. Import a preset of your own with custom_imports."
        )
    missing = [member for member in PRESET_MEMBERS if not hasattr(preset, member)]
    if missing:
        raise ValueError(f"preset='{name}': the class {preset.__name__} has no {missing[0]}; inherit from Preset.")
    return preset()


def default_preset(teacher_cfg: dict) -> str:
    """Return the name of the preset for a config that does not set ``preset``."""
    return 'cosine' if is_encoder(teacher_cfg) else 'diffkd'


def check_roi_taps(pairs: Dict[str, Pair], student_cfg: dict, teacher_cfg: dict) -> None:
    """Check that pairs with taps in RoI heads are comparable.

    Args:
        pairs (dict[str, Pair]): All pairs.
        student_cfg (dict): Config of the student.
        teacher_cfg (dict): Config of the teacher.

    Raises:
        ValueError: If a pair is not comparable. The message contains the pair and the reason.
    """
    roi_pairs = {
        name: pair for name, pair in pairs.items() if any(map(_in_roi_head, pair.student_taps + pair.teacher_taps))
    }
    for name, pair in roi_pairs.items():
        for path in pair.student_taps + pair.teacher_taps:
            if not is_roi_tap(path):
                raise ValueError(
                    f"distill.{name} taps '{path}', but RoI heads can only be compared inside 'roi_head.bbox_head', "
                    'which runs on the same regions in both models.'
                )
        heads = [_box_head(name, owner, cfg) for owner, cfg in (('student', student_cfg), ('teacher', teacher_cfg))]
        # class scores may have different numbers of classes, because the channels of shared classes can be selected
        are_scores = all(path.endswith('.fc_cls') for path in pair.student_taps + pair.teacher_taps)
        for key in COMPARABLE:
            if key == 'num_classes' and are_scores:
                continue
            ours, theirs = (head.get(key) for head in heads)
            if comparable(ours) != comparable(theirs):
                raise ValueError(
                    f'distill.{name}: the box heads of student and teacher differ in {key} ({ours} and {theirs}), so '
                    'their outputs have different meanings; leave this pair out.'
                )
    if roi_pairs:
        for name, pair in pairs.items():
            outside = [tap for tap in pair.teacher_taps if tap.split('.')[0] not in ('backbone', 'neck')]
            if name not in roi_pairs and outside:
                raise ValueError(
                    f"distill.{name} taps the teacher's '{outside[0]}', which the teacher does not run when RoI heads "
                    f'are compared (distill.{next(iter(roi_pairs))}); leave one of the two pairs out.'
                )


def _completed(name: str, cfg: dict, defaults: Dict[str, dict], known: Dict[str, dict]) -> dict:
    """Fill in the taps and neck settings that a pair's config leaves out.

    A pair with the name of a default pair gets the taps and neck settings of this default pair. A pair with a new name
    gets only the missing one of its two taps. If both are missing, an error is raised, because the name is probably
    misspelled.
    """
    if cfg.get('student') and cfg.get('teacher'):
        return cfg
    default = known.get(name)
    if default is None:
        if len(defaults) > 1 or not (cfg.get('student') or cfg.get('teacher')):
            raise ValueError(
                f'distill.{name} names no tap and is not a default pair ({", ".join(defaults)}) of these models. '
                f"Remove it, or name its taps: distill=dict({name}=dict(student='backbone', teacher='backbone'))."
            )
        (default,) = defaults.values()
        default = dict(default, neck={})
    neck, default_neck = cfg.get('neck') or {}, default.get('neck') or {}
    # drop the default settings if they are for a neck of a different type
    if 'type' in neck and neck['type'] != default_neck.get('type', neck['type']):
        default_neck = {}
    # drop the default settings of the denoiser if the pair turns denoising off
    if default_neck.get('denoise', True) and not neck.get('denoise', True):
        default_neck = {key: value for key, value in default_neck.items() if key == 'loss_kd'}
    return {**default, **cfg, 'neck': _with_defaults(neck, default_neck)}


def _with_defaults(neck: dict, defaults: dict) -> dict:
    """Fill in the settings that a neck's config leaves out, including those of a ``loss_kd`` without ``type``."""
    loss, default_loss = neck.get('loss_kd'), defaults.get('loss_kd')
    if isinstance(loss, dict) and 'type' not in loss and default_loss:
        neck = dict(neck, loss_kd={**default_loss, **loss})
    return {**defaults, **neck}


def _check_pair(name: str, cfg: dict) -> None:
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name) or 'loss' in name:
        raise ValueError(
            f'The pair name {name!r} cannot be used: it becomes part of checkpoint keys and log keys, and mmengine '
            "sums log keys with 'loss'. Use a plain word such as 'fpn'."
        )
    for part in PARTS:
        if part in name:
            raise ValueError(
                f"The pair name '{name}' contains '{part}': optimizer settings for that part of a model (custom_keys) "
                "would also apply to the diffusion module. Use a different word, such as 'feat' or 'logits'."
            )
    if not isinstance(cfg, dict):
        raise ValueError(f"distill.{name}={cfg!r} must be a dict such as dict(student='neck', teacher='neck').")
    for field in cfg:
        if field == 'loss_weight':
            raise ValueError(
                f'distill.{name}.loss_weight belongs in the loss: neck=dict(loss_kd=dict(loss_weight=...)).'
            )
        if field not in FIELDS and field in inspect.signature(FeatureDiffusion).parameters:
            raise ValueError(f'distill.{name}.{field} belongs in the neck: neck=dict({field}=...).')
        if field not in FIELDS:
            nearest = closest_names(field, FIELDS)
            raise ValueError(f'distill.{name}.{field} is not a field of a pair; the nearest are {nearest}.')
        check_value(f'distill.{name}.{field}', cfg[field], FIELDS[field])
    levels = cfg.get('levels')
    if isinstance(levels, (list, tuple)) and len(set(levels)) < len(levels):
        raise ValueError(f'distill.{name}.levels={list(levels)} names a level twice.')
    counts = [1 if isinstance(tap, str) else len(tap) for tap in (cfg.get('student'), cfg.get('teacher')) if tap]
    if len(set(counts)) > 1:
        raise ValueError(
            f'distill.{name} names {counts[0]} taps of the student and {counts[1]} of the teacher; use equal numbers.'
        )


def _read_pair(cfg: dict, student_cfg: dict, preset) -> Pair:
    neck, levels = dict(cfg.get('neck') or {}), cfg.get('levels')
    if neck.get('loss_kd', {}) is None:
        del neck['loss_kd']
    neck.setdefault('type', preset.neck_defaults.get('type', 'mmdiffkd.FeatureDiffusionNeck'))
    cls = get_class(MODELS, neck['type']) if isinstance(neck['type'], str) else neck['type']
    is_feature_diffusion = isinstance(cls, type) and issubclass(cls, FeatureDiffusionNeck)
    if is_feature_diffusion and neck.get('denoise', cls.denoises):
        neck = {**preset.neck_defaults, **neck}
    loss = neck.get('loss_kd', {})
    if is_feature_diffusion and isinstance(loss, dict) and 'type' not in loss:
        neck = _with_defaults(neck, dict(loss_kd=preset.default_distance(student_cfg)))
    return Pair(
        *(_as_taps(cfg[side]) for side in ('student', 'teacher')),
        [levels] if isinstance(levels, int) else levels,
        neck,
        cfg.get('classes'),
    )


def _in_roi_head(path: str) -> bool:
    return path.split('.')[0] == 'roi_head'


def _box_head(name: str, owner: str, model_cfg: dict) -> dict:
    bbox_head = (model_cfg.get('roi_head') or {}).get('bbox_head')
    if bbox_head is None:
        raise ValueError(
            f'distill.{name} compares RoI heads, but the {owner} {type_name(model_cfg["type"])} has no RoI head; leave '
            'this pair out.'
        )
    if isinstance(bbox_head, (list, tuple)):
        raise ValueError(
            f"distill.{name} compares RoI heads, but the {owner}'s {type_name(model_cfg['roi_head']['type'])} has "
            f'{len(bbox_head)} stages with different box targets, which cannot be compared with the box targets of a '
            'different head; leave this pair out.'
        )
    return bbox_head


def _as_taps(taps) -> Union[str, List[str]]:
    return taps if isinstance(taps, str) else list(taps)
