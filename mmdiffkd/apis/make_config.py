"""Write a distillation config from the configs of a student and a teacher."""

import copy
import keyword
import os
from pathlib import Path
from textwrap import indent
from typing import Optional

from mmengine.config import Config

from mmdiffkd.models.distillers.pairs import default_preset
from mmdiffkd.models.encoders import PRETRAINED, is_library_model
from mmdiffkd.utils import read_config
from mmdiffkd.utils.config import get_custom_imports
from mmdiffkd.utils.model_index import zoo_checkpoint

from .build import build_distiller
from .distill_to_text import distill_to_text

# packages whose configs are inherited by file path: mmengine resolves `mmseg::...` only for the original package
BY_PATH = ('mmseg',)
HEAD = """\
# Distill {teacher_name} into {student_name}.
_base_ = {base}
custom_imports = dict(imports={imports}, allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='mmdiffkd.DiffKDDistiller',
    student=_base_.model,
"""
PURE_PYTHON_HEAD = """\
# Distill {teacher_name} into {student_name}.
from mmengine.config import read_base

with read_base():
    from {base} import *

model = dict(
    type='mmdiffkd.DiffKDDistiller',
    student=model,
"""
BODY = """\
    teacher=dict(
        config={config},
        checkpoint={checkpoint!r},  # a path, a URL, or {word!r}
    ),
    preset={preset!r},  # the method (docs/configure/methods.md); the pairs below are only for this method
    # Default pairs. Uncomment to change taps, levels or settings; tune neck.loss_kd.loss_weight first.
{hint}{distill}
)
# Atomic checkpoints and a fixed seed: a run that is killed and resumed ends with the same weights.
{checkpoint_hook}
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
    student: str,
    teacher: str,
    checkpoint: Optional[str] = None,
    output: Optional[str] = None,
    preset: Optional[str] = None,
) -> str:
    """Write the config that distills a teacher into a student, and check that it can be built.

    The config has the format of the student's config, text or pure Python, because a config of one format cannot
    inherit from a config of the other format.

    Args:
        student (str): Config of the student, ``pkg::path`` or a file.
        teacher (str): Config of the teacher, ``pkg::path`` or a file, or a model such as ``'timm::NAME'``.
        checkpoint (str, optional): Weights of the teacher: a path, a URL, ``'zoo'`` for the weights in the model index
            of its package, or ``'pretrained'`` for the weights of a model of timm, torchvision or transformers. A path
            is relative to the working directory of the training. Defaults to None: ``'zoo'`` or ``'pretrained'``,
            depending on the teacher.
        output (str, optional): File to write. Paths of configs are relative to its folder. Two paths are absolute: the
            teacher's path in a pure Python config, and a path on a different Windows drive. With None, no file is
            written and all paths are absolute, but a pure Python config is imported relative to the working directory.
            Defaults to None.
        preset (str, optional): Method, such as ``'cwd'``; :func:`list_presets` lists the names. Defaults to None:
            ``'cosine'`` for models of timm, torchvision and transformers, ``'diffkd'`` for other teachers.

    Returns:
        str: The text of the config.

    Raises:
        FileExistsError: If ``output`` exists.
        FileNotFoundError: If a config or a local checkpoint does not exist.
        ModuleNotFoundError: If the package of a config is not installed.
        ValueError: If the model index lists no weights for the teacher, a config is already a distillation config, or
            the student cannot be distilled from this teacher, or Python cannot import a pure Python config.
    """
    if output is not None and os.path.exists(output):
        raise FileExistsError(f"The file '{output}' already exists; choose a different name, or remove the file.")
    student_cfg, teacher_cfg = read_config(student), read_config(teacher)
    for source, cfg in ((student, student_cfg), (teacher, teacher_cfg)):
        if 'student' in cfg.model:
            raise ValueError(f"'{source}' is already a distillation config; give the config of a plain model.")
    word = PRETRAINED if is_library_model(teacher_cfg.model) else 'zoo'
    checkpoint, preset = checkpoint or word, preset or default_preset(teacher_cfg.model)
    if checkpoint == 'zoo':
        zoo_checkpoint(teacher)
    elif checkpoint != word and '://' not in checkpoint and not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"The teacher's checkpoint '{checkpoint}' does not exist.")
    folder = None if output is None else Path(output).resolve().parent
    is_pure_python = Config._is_lazy_import(student_cfg.filename)
    head = PURE_PYTHON_HEAD if is_pure_python else HEAD
    own_hooks = '#     *custom_hooks,\n' if is_pure_python else "#     *_base_.get('custom_hooks', []),\n"
    distill = indent(_defaults(student_cfg, teacher, checkpoint, preset), '    # ', lambda line: True)
    text = (head + BODY).format(
        teacher_name=Path(teacher).stem,
        student_name=Path(student).stem,
        base=_module(student_cfg.filename, folder) if is_pure_python else _base(student, folder),
        imports=[*get_custom_imports(student_cfg), 'mmdiffkd'],
        # mmengine replaces {{ fileDirname }} in text configs only
        config=_file(teacher, None if is_pure_python else folder, '{{ fileDirname }}/'),
        checkpoint=checkpoint,
        word=word,
        checkpoint_hook=_checkpoint_hook(student_cfg, is_pure_python),
        hooks=own_hooks if student_cfg.get('custom_hooks') else '',
        preset=preset,
        hint=HINT if 'denoiser' in distill else '',
        distill=distill,
    )
    if output is not None:
        folder.mkdir(parents=True, exist_ok=True)
        # a path that is not UTF-8 has surrogate characters; surrogateescape writes its original bytes
        Path(output).write_text(text, encoding='utf-8', errors='surrogateescape')
    return text


def _defaults(student: Config, teacher: str, checkpoint: str, preset: str) -> str:
    """Build the distiller, and return its default pairs as config text."""
    cfg = copy.deepcopy(student)
    teacher_cfg = dict(config=teacher, checkpoint=checkpoint)
    cfg.model = dict(type='mmdiffkd.DiffKDDistiller', student=cfg.model, teacher=teacher_cfg, preset=preset)
    _, model = build_distiller(cfg)
    return distill_to_text(model).replace('distill = dict(', 'distill=dict(', 1) + ','


def _checkpoint_hook(student: Config, is_pure_python: bool) -> str:
    """Return the line that sets the checkpoint hook. Pure Python configs change the imported dicts."""
    hook = "dict(type='mmdiffkd.CheckpointHook')"
    if not is_pure_python or 'default_hooks' not in student:
        return f'default_hooks = dict(checkpoint={hook})'
    if student.default_hooks.get('checkpoint') is None:
        return f'default_hooks.update(checkpoint={hook})'
    return f'default_hooks.checkpoint.update({hook})'


def _base(student: str, folder: Optional[Path]) -> str:
    package, _, path = student.rpartition('::')
    if package in BY_PATH:
        return f"__import__('{package}').__path__[0] + '/.mim/configs/{path}'"
    return _file(student, folder)


def _module(student: str, folder: Optional[Path]) -> str:
    """Return the name by which a config in ``folder``, or the working directory, imports a pure Python config."""
    folder = folder or Path.cwd()
    parts = Path(_relative(Path(student).resolve(), folder)).with_suffix('').parts
    names = [part for part in parts if part != '..']
    unfit = [name for name in names if not name.isidentifier() or keyword.iskeyword(name)]
    if unfit:
        raise ValueError(
            f"The student's config '{student}' is a pure Python config, and a config in '{folder}' cannot import it, "
            f"because '{unfit[0]}' is no name of a Python module. Rename the file, or write the new config beside it."
        )
    return '.' * (1 + len(parts) - len(names)) + '.'.join(names)


def _file(source: str, folder: Optional[Path], here: str = '') -> str:
    """Return the Python literal for a path in the generated config, relative to its folder if there is one."""
    if '::' in source:
        return repr(source)
    path = Path(source).resolve()
    if folder is not None:
        path = Path(_relative(path, folder))
    return repr(path.as_posix() if path.is_absolute() else here + path.as_posix())


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # the paths are on different drives of Windows
        return str(path)
