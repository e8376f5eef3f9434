"""Convert a distillation config to the config of the plain student, and write it to the work dir of a run."""

import os.path as osp
from logging import WARNING
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from .config import get_custom_imports, type_name

PACKAGE = 'mmdiffkd'
STUDENT_CONFIG = 'student.py'  # name of the plain student's config in the work dir of a run


def student_config(cfg: Config) -> Config:
    """Convert a distillation config to the config of the plain student.

    Settings that do not belong to the distillation, such as data and schedule, are kept.

    Args:
        cfg (Config): The distillation config.

    Returns:
        Config: A config that does not need mmdiffkd.

    Raises:
        ValueError: If the config is not a distillation config.
    """
    if 'student' not in cfg.model:
        raise ValueError(
            f'{cfg.filename or "This config"} is not a distillation config: its model is a plain '
            f"{type_name(cfg.model.type)}. If it is the config of an exported student, use the run's own config "
            'instead.'
        )
    content = ConfigDict(cfg.to_dict())
    model = content.model.student
    if model.get('_scope_') == content.get('default_scope'):
        model.pop('_scope_', None)  # not needed, because default_scope names the same package
    content.model = model
    if content.get('resume'):  # the distillation was resumed, but there is no run of the plain student to resume
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

    Nothing is written if the config has no student, for example if the distiller is a part of a larger model. Nothing
    is written in pre-training either, where the student is a class of mmdiffkd.

    Args:
        run_config (str): Text of the run's config, as mmengine's ``RuntimeInfoHook`` publishes it.
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
            # the run's own config is also named student.py, and the Runner has saved it there: do not overwrite it
            file = file.with_name(f'plain_{STUDENT_CONFIG}')
        student_config(cfg).dump(file)
    except OSError as error:
        print_log(f'The config of the plain student was not written: {error}', 'current', WARNING)
        return
    print_log(
        f"'{file}' is the config of the plain student. Inference opens it with any checkpoint of this run.",
        logger='current',
    )
