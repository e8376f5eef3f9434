import inspect
import re
from typing import Sequence

from mmengine.config import Config
from torch import nn

from mmdiffkd.models import DiffKDDistiller, FeatureDiffusionNeck
from mmdiffkd.models.diffusion.feature_diffusion import FeatureDiffusion
from mmdiffkd.utils.config import with_named_types

# arguments that the distiller or the neck passes, so that configs do not contain them
WIDTHS = ('student_channels', 'teacher_channels')
GIVEN = ('channels', 'num_train_timesteps')
# the only settings that a pair without denoising uses
PLAIN = ('denoise', 'align', 'loss_kd', 'share_levels')


def distill_to_text(model: DiffKDDistiller) -> str:
    """Write the pairs of a distiller as config text, including default settings.

    Args:
        model (DiffKDDistiller): A distiller with a teacher.

    Returns:
        str: ``distill = dict(...)``.
    """
    pairs = {
        name: dict(
            student=pair.student,
            teacher=pair.teacher,
            levels=[s for s, _ in model.matched_levels[name][0]],
            neck=_with_defaults(pair.neck, model.diffkd[name]),
            **({'classes': pair.classes} if pair.classes else {}),
        )
        for name, pair in model.pairs.items()
    }
    text = Config(dict(distill=with_named_types(pairs))).pretty_text.strip()
    return re.sub(r'\[\s+([\d,\s]+?),?\s*\]', lambda match: f'[{" ".join(match[1].split())}]', text)


def _with_defaults(cfg: dict, neck: nn.Module) -> dict:
    """Add the default arguments of mmdiffkd's necks and their modules to the config of a neck."""
    kind = type(neck)
    if kind.__module__.split('.')[0] != 'mmdiffkd':
        return cfg
    if kind is not FeatureDiffusionNeck:
        full = {**_defaults(kind, WIDTHS), **cfg}
        if isinstance(neck, FeatureDiffusionNeck):
            full['loss_kd'] = _part(full['loss_kd'], neck.levels[0].loss_kd)
        return full
    level = neck.levels[0]
    full = {**_defaults(FeatureDiffusion, WIDTHS), **_defaults(FeatureDiffusionNeck, WIDTHS)}
    if not level.denoise:
        full = {key: value for key, value in full.items() if key in PLAIN}
    full.update(cfg, type='mmdiffkd.FeatureDiffusionNeck')
    full['loss_kd'] = _part(full['loss_kd'], level.loss_kd)
    if level.denoise:
        full['denoiser'] = _part(full['denoiser'], level.denoiser)
        full['noise_adapter'] = _part(full['noise_adapter'], level.noise_adapter)
        full['scheduler'] = _part(full['scheduler'], level.scheduler)
    return full


def _part(cfg: dict, module: nn.Module) -> dict:
    kind = type(module)
    if kind.__module__.split('.')[0] != 'mmdiffkd':
        return cfg
    return {**_defaults(kind, GIVEN), **(cfg or {}), 'type': f'mmdiffkd.{kind.__name__}'}


def _defaults(kind: type, given: Sequence[str] = ()) -> dict:
    parameters = inspect.signature(kind).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in given}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
