"""Distill and export a student in one call."""

import copy
import time
from pathlib import Path
from typing import Optional, Sequence, Union

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmdiffkd.utils.config import get_custom_imports, resolve_config, set_loader_defaults
from mmdiffkd.utils.model_index import zoo_checkpoint

from .export import student_config, student_weights

Source = Union[str, Path, Config]


def distill(
    student_config: Source,
    teacher_config: Source,
    teacher_checkpoint: str = 'zoo',
    work_dir: str = 'work_dirs/distill',
    pairs: Optional[dict] = None,
    preset: Optional[str] = None,
    init_from_teacher: Optional[Sequence[str]] = None,
    custom_hooks: Sequence[dict] = (),
    cfg_options: Optional[dict] = None,
    resume: bool = False,
) -> dict:
    """Distill a teacher into a student, then export the student.

    Data, schedule and optimizer come from the student's config. In distributed training, the main process writes the
    exported files.

    Args:
        student_config (str, Path or Config): Config of the student: ``pkg::path``, a file, or a loaded config.
        teacher_config (str, Path or Config): Config of the teacher.
        teacher_checkpoint (str): Weights of the teacher: a path, a URL, or ``'zoo'`` for the weights that the model
            index of its package lists. Defaults to ``'zoo'``.
        work_dir (str): Folder for logs and checkpoints. Defaults to ``'work_dirs/distill'``.
        pairs (dict, optional): Features to compare, in the format of ``distill`` in configs. Defaults to the
            pairs of the preset.
        preset (str, optional): Method, such as ``'cwd'``; :func:`list_presets` lists the names. Defaults to
            ``'diffkd'``, the paper's method.
        init_from_teacher (list[str], optional): Modules that the student copies from the teacher before training.
        custom_hooks (list[dict]): Hooks to add to the student's config, such as
            ``dict(type='mmdiffkd.DiffKDVisualizationHook')``. Defaults to ``()``.
        cfg_options (dict, optional): Overrides, as on the command line: ``{'train_cfg.max_epochs': 12}``.
        resume (bool): Resume from the latest checkpoint in ``work_dir``. Defaults to False.

    Returns:
        dict: Paths and metrics:

        * ``config``, ``checkpoint``: the distillation config and the last checkpoint of the run.
        * ``student_config``, ``student_checkpoint``: the exported student, which loads without mmdiffkd.
        * ``metrics``: metrics of the last validation; empty without validation.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: If a config or the weights are missing, or the student
            cannot be distilled from this teacher.
    """
    cfg = distillation_config(student_config, teacher_config, teacher_checkpoint, pairs, preset, init_from_teacher)
    cfg.work_dir, cfg.resume = str(work_dir), resume
    cfg.custom_hooks = [*cfg.get('custom_hooks', ()), *custom_hooks]
    cfg.merge_from_dict(cfg_options or {})
    set_loader_defaults(cfg)
    # use a new name: mmengine caches visualizers by name, so a second run would write to the first run's folder
    cfg.setdefault('visualizer', dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]))
    cfg.visualizer.name = f'{work_dir}_{time.time_ns()}'
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.train()
    return _export(runner, Path(cfg.work_dir))


def distillation_config(
    student: Source,
    teacher: Source,
    checkpoint: str,
    pairs: Optional[dict],
    preset: Optional[str],
    init_from_teacher: Optional[Sequence[str]],
) -> Config:
    """Return the config that distills a teacher into a student. Arguments and errors: see :func:`distill`."""
    cfg = copy.deepcopy(student) if isinstance(student, Config) else resolve_config(student)
    if 'student' in cfg.model:
        raise ValueError('student_config is already a distillation config; train it with tools/train.py or a Runner.')
    if isinstance(teacher, Config):
        if checkpoint == 'zoo':
            raise ValueError(
                "teacher_checkpoint='zoo' needs teacher_config='pkg::path'; for other configs, give the path or URL of "
                'the weights.'
            )
        kept = ('model', 'default_scope', 'data_preprocessor', 'custom_imports')
        teacher = {key: value for key, value in teacher.to_dict().items() if key in kept}
    elif checkpoint == 'zoo':
        checkpoint = zoo_checkpoint(str(teacher))
    model = dict(
        type='mmdiffkd.DiffKDDistiller',
        student=cfg.model,
        teacher=dict(config=str(teacher) if isinstance(teacher, Path) else teacher, checkpoint=checkpoint),
    )
    if pairs:
        model['distill'] = pairs
    if preset:
        model['preset'] = preset
    if init_from_teacher:
        model['init_from_teacher'] = init_from_teacher
    cfg.model = model
    cfg.custom_imports = dict(imports=[*get_custom_imports(cfg), 'mmdiffkd'], allow_failed_imports=False)
    cfg.merge_from_dict(dict(default_hooks=dict(checkpoint=dict(type='mmdiffkd.CheckpointHook'))))
    return cfg


def _export(runner: Runner, work_dir: Path) -> dict:
    checkpoint = runner.message_hub.get_info('last_ckpt')  # CheckpointHook(out_dir=...) may write outside work_dir
    config, plain_config, plain_checkpoint = (
        str(work_dir / name) for name in ('distill.py', 'student.py', 'student.pth')
    )
    if is_main_process():
        runner.cfg.dump(config)
        student_config(runner.cfg).dump(plain_config)
        torch.save(student_weights(checkpoint, runner.cfg), plain_checkpoint)
    barrier()
    metrics = {
        key[len('val/') :]: float(scalar.current())
        for key, scalar in runner.message_hub.log_scalars.items()
        if key.startswith('val/') and key not in ('val/time', 'val/data_time')
    }
    return dict(
        config=config,
        checkpoint=checkpoint,
        student_config=plain_config,
        student_checkpoint=plain_checkpoint,
        metrics=metrics,
    )
