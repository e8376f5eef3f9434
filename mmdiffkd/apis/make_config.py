"""A distillation config from two configs."""

import os
from pathlib import Path
from textwrap import indent
from typing import Optional

from mmengine.config import Config

from mmdiffkd.utils import read_config
from mmdiffkd.utils.config import get_custom_imports, zoo_checkpoint

from .build import build_distiller
from .distill_to_text import distill_to_text

# mmengine knows mmsegmentation by its original name alone, so `mmseg::` is no base with the maintained packages
BY_PATH = ('mmseg',)
TEMPLATE = """\
# {teacher_name} teaches {student_name}.
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
    # What is distilled by default, to be uncommented and changed: taps, levels, most of all neck.loss_kd.loss_weight.
    # Cheaper: neck=dict(latent_channels=64), neck=dict(memory_efficient=True).
    # Beyond the paper: preset='plus' (docs/pairs.md), in configs that spell out no distill.
{distill}
)
# whole files, and seeds that make a run which was killed resumable to the same weights
default_hooks = dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))
randomness = dict(seed=0)
# Pictures of what is compared (in vis_data/vis_image of the run), and a look at the teacher before it teaches:
# custom_hooks = [
{hooks}#     dict(type='mmdiffkd.DiffKDVisualizationHook', interval=500),
#     dict(type='mmdiffkd.TeacherCheckHook'),
# ]
# If the loss explodes: optim_wrapper = dict(clip_grad=dict(max_norm=35))
"""


def make_config(student: str, teacher: str, checkpoint: str = 'zoo', output: Optional[str] = None) -> str:
    """Write the config that distils a teacher into a student, and see that it can be built.

    Args:
        student (str): Config of the student, ``pkg::path`` or a file.
        teacher (str): Config of the teacher, ``pkg::path`` or a file.
        checkpoint (str): Weights of the teacher: a path, a URL, or ``'zoo'`` for those that the package lists for the
            teacher's config. A path is meant from where the training is started. Defaults to ``'zoo'``.
        output (str, optional): File to write; paths in it are relative to it. None writes none, paths are absolute
            then. Defaults to None.

    Returns:
        str: The text of the config.

    Raises:
        FileExistsError: If ``output`` exists.
        FileNotFoundError: If a config, or a checkpoint that is a path, does not exist.
        ModuleNotFoundError: If the package of a config is not installed.
        ValueError: If the package lists no weights for the teacher, one of the configs is a distillation already, or
            the two cannot be distilled.
    """
    if output is not None and os.path.exists(output):
        raise FileExistsError(f"There is a file '{output}' already; choose another name or remove it.")
    student_cfg, teacher_cfg = read_config(student), read_config(teacher)
    for source, cfg in ((student, student_cfg), (teacher, teacher_cfg)):
        if 'student' in cfg.model:
            raise ValueError(f"'{source}' is a distillation already; give the plain config.")
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
    """What a config without ``distill`` distils; its paths are absolute."""
    try:
        cfg = Config.fromstring(text, '.py')
    except RuntimeError as error:  # of mmengine, whose two styles of config do not mix
        raise ValueError(
            f"The student's config '{student}' is one in pure Python, which cannot be inherited here; give one in "
            'which types are strings.'
        ) from error
    _, model = build_distiller(cfg)
    return distill_to_text(model).replace('distill = dict(', 'distill=dict(', 1) + ','


def _base(student: str, folder: Optional[Path]) -> str:
    package, _, path = student.rpartition('::')
    if package in BY_PATH:
        return f"__import__('{package}').__path__[0] + '/.mim/configs/{path}'"
    return _file(student, folder)


def _file(source: str, folder: Optional[Path], here: str = '') -> str:
    """The literal that names a config in the file to write."""
    if '::' in source:
        return repr(source)
    path = Path(source).resolve()
    return repr(path.as_posix() if folder is None else here + Path(os.path.relpath(path, folder)).as_posix())
