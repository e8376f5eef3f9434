"""Write a distillation config from the configs of a student and a teacher."""

import os
from pathlib import Path
from textwrap import indent
from typing import Optional

from mmengine.config import Config

from mmdiffkd.utils import read_config
from mmdiffkd.utils.config import get_custom_imports, zoo_checkpoint

from .build import build_distiller
from .distill_to_text import distill_to_text

# packages whose configs are inherited by file path: mmengine resolves `mmseg::...` only for the original package
BY_PATH = ('mmseg',)
TEMPLATE = """\
# Distill {teacher_name} into {student_name}.
_base_ = {base}
custom_imports = dict(imports={imports}, allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
    teacher=dict(
        config={config},
        checkpoint={checkpoint!r},  # a path, a URL, or 'zoo'
    ),
    preset={preset!r},  # the method (docs/configure/methods.md); leave out distill if you change it
    # Default pairs. Uncomment to change taps, levels or settings; tune neck.loss_kd.loss_weight first.
{hint}{distill}
)
# Atomic checkpoints and a fixed seed: a run that is killed and resumed ends with the same weights.
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
# Save images of the compared features (in vis_data/vis_image), and validate the teacher before training:
# custom_hooks = [
{hooks}#     dict(type='mmdiffkd.DiffKDVisualizationHook', interval=500),
#     dict(type='mmdiffkd.TeacherCheckHook'),
# ]
# If the loss diverges: optim_wrapper = dict(clip_grad=dict(max_norm=35))
"""
HINT = '    # To reduce the cost: neck=dict(latent_channels=64).\n'


def make_config(
    student: str, teacher: str, checkpoint: str = 'zoo', output: Optional[str] = None, preset: str = 'diffkd'
) -> str:
    """Write the config that distills a teacher into a student, and check that it can be built.

    Args:
        student (str): Config of the student, ``pkg::path`` or a file.
        teacher (str): Config of the teacher, ``pkg::path`` or a file.
        checkpoint (str): Weights of the teacher: a path, a URL, or ``'zoo'`` for the weights that the model index of
            its package lists. A path is relative to the working directory of the training. Defaults to ``'zoo'``.
        output (str, optional): File to write, with config paths relative to its folder. With None, no file is written
            and the paths are absolute. Defaults to None.
        preset (str): Method, such as ``'cwd'``; :func:`list_presets` lists the names. Defaults to ``'diffkd'``.

    Returns:
        str: The text of the config.

    Raises:
        FileExistsError: If ``output`` exists.
        FileNotFoundError: If a config or a local checkpoint does not exist.
        ModuleNotFoundError: If the package of a config is not installed.
        ValueError: If the model index lists no weights for the teacher, a config is already a distillation config, or
            the student cannot be distilled from this teacher.
    """
    if output is not None and os.path.exists(output):
        raise FileExistsError(f"The file '{output}' already exists; choose a different name or remove it.")
    student_cfg, teacher_cfg = read_config(student), read_config(teacher)
    for source, cfg in ((student, student_cfg), (teacher, teacher_cfg)):
        if 'student' in cfg.model:
            raise ValueError(f"'{source}' is already a distillation config; give the config of a plain model.")
    if checkpoint == 'zoo':
        zoo_checkpoint(teacher)
    elif '://' not in checkpoint and not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"The teacher's checkpoint '{checkpoint}' does not exist.")
    own_hooks = "#     *_base_.get('custom_hooks', []),\n" if student_cfg.get('custom_hooks') else ''

    def write(folder: Optional[Path], distill: str = '') -> str:
        return TEMPLATE.format(
            teacher_name=Path(teacher).stem,
            student_name=Path(student).stem,
            base=_base(student, folder),
            imports=[*get_custom_imports(student_cfg), 'mmdiffkd'],
            config=_file(teacher, folder, '{{ fileDirname }}/'),
            checkpoint=checkpoint,
            preset=preset,
            hint=HINT if 'denoiser' in distill else '',
            hooks=own_hooks,
            distill=distill,
        )

    distill = indent(_defaults(write(None), student), '    # ', lambda line: True)
    if output is None:
        return write(None, distill)
    folder = Path(output).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    text = write(folder, distill)
    Path(output).write_text(text)
    return text


def _defaults(text: str, student: str) -> str:
    """Build the config in ``text``, whose paths must be absolute, and return its default pairs as config text."""
    try:
        cfg = Config.fromstring(text, '.py')
    except RuntimeError as error:  # a text config cannot inherit a pure Python config
        raise ValueError(
            f"The student's config '{student}' is a pure Python config, which cannot be inherited here; give a config "
            'whose types are strings.'
        ) from error
    _, model = build_distiller(cfg)
    return distill_to_text(model).replace('distill = dict(', 'distill=dict(', 1) + ','


def _base(student: str, folder: Optional[Path]) -> str:
    package, _, path = student.rpartition('::')
    if package in BY_PATH:
        return f"__import__('{package}').__path__[0] + '/.mim/configs/{path}'"
    return _file(student, folder)


def _file(source: str, folder: Optional[Path], here: str = '') -> str:
    """Return the Python literal for a path in the generated config, relative to its folder if there is one."""
    if '::' in source:
        return repr(source)
    path = Path(source).resolve()
    return repr(path.as_posix() if folder is None else here + Path(os.path.relpath(path, folder)).as_posix())
