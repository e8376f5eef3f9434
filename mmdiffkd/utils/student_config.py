"""The config of the plain student of a distillation."""

import os.path as osp
from logging import WARNING
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from .config import get_custom_imports, type_name

PACKAGE = 'mmdiffkd'
STUDENT_CONFIG = 'student.py'  # in the work dir of every run


def student_config(cfg: Config) -> Config:
    """Convert a distillation config to the config of the plain student.

    Settings that are not part of the distillation, such as data and schedule, are kept.

    Args:
        cfg (Config): A config with a ``DiffKDDistiller``.

    Returns:
        Config: A config that does not need mmdiffkd.

    Raises:
        ValueError: If the config has no distiller.
    """
    if 'student' not in cfg.model:
        raise ValueError(
            f'{cfg.filename or "This config"} is not a distillation config: its model is a plain '
            f"{type_name(cfg.model.type)}. If it is the exported student, use the run's own config instead."
        )
    content = ConfigDict(cfg.to_dict())
    model = content.model.student
    if model.get('_scope_') == content.get('default_scope'):
        model.pop('_scope_', None)  # redundant, since default_scope names the same package
    content.model = model
    if content.get('resume'):  # set if the distillation was resumed; the plain student has no run to resume
        content.resume = False
    kept, imports = get_custom_imports(cfg), content.pop('custom_imports', None)
    if kept:
        content.custom_imports = dict(imports, imports=kept)
    if 'custom_hooks' in content:
        content.custom_hooks = [hook for hook in content.custom_hooks if not _is_ours(hook)]
    checkpoint = content.get('default_hooks', {}).get('checkpoint')
    if checkpoint is not None and _is_ours(checkpoint):
        checkpoint.type = 'CheckpointHook'  # mmengine's hook, which takes the same arguments
    return Config(content)


def _is_ours(hook: dict) -> bool:
    kind = hook['type']
    name = kind if isinstance(kind, str) else kind.__module__
    return name.split('.')[0] == PACKAGE


def write_student_config(run_config: str) -> None:
    """Write the config of the plain student to the work dir of a run.

    Args:
        run_config (str): Text of the run's config, as mmengine's ``RuntimeInfoHook`` publishes it. Configs without a
            student are skipped, for example if the distiller is a part of another model, and so is a student of this
            package, which is pre-trained.
    """
    cfg = Config.fromstring(run_config, '.py')
    work_dir = cfg.get('work_dir')
    if not isinstance(cfg.get('model'), dict) or 'student' not in cfg.model or not work_dir or not osp.isdir(work_dir):
        return
    if _is_ours(cfg.model.student):
        return
    file = Path(work_dir, STUDENT_CONFIG)
    try:
        if file.is_file() and file.read_text(encoding='utf-8') == run_config:
            file = file.with_name(f'plain_{STUDENT_CONFIG}')  # the Runner saved a config of this name there
        student_config(cfg).dump(file)
    except OSError as error:
        print_log(f'The config of the plain student was not written: {error}', 'current', WARNING)
        return
    print_log(
        f"'{file}' is the config of the plain student. Inference opens it with any checkpoint of this run.",
        logger='current',
    )
