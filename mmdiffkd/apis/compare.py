"""Train a student with several distillation methods and seeds, and compare the results."""

import re
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Union

from mmengine.config import Config
from mmengine.logging import MMLogger

from mmdiffkd.utils import closest_names, read_config, zoo_checkpoint
from mmdiffkd.visualization.differences import BASELINE

from .compare_results import write_results
from .compare_runs import TEACHER, ComparisonRuns, lock_folder
from .distill import Source
from .list_presets import list_presets

ARM_KEYS = ('preset', 'loss_weight', 'distill', 'init_from_teacher', 'custom_hooks', 'custom_imports')
ARM_NAME = re.compile(r'[\w.=+-]+')  # the name of an arm is also a folder name and a part of shell commands


def compare(
    student_config: Source,
    teacher_config: Source,
    teacher_checkpoint: str = 'zoo',
    presets: Optional[Sequence[str]] = None,
    arms: Optional[Dict[str, Optional[dict]]] = None,
    seeds: Sequence[int] = (0, 1, 2),
    schedule: float = 1.0,
    jobs: Optional[int] = None,
    work_dir: Union[str, Path] = 'work_dirs/compare',
    metric: Optional[str] = None,
    list_runs: bool = False,
    cfg_options: Optional[dict] = None,
) -> dict:
    """Train a student alone and with several methods, and compare the results, paired by seed.

    A run trains one method with one seed, by ``tools/train.py`` in the folder ``WORK_DIR/METHOD/seedN``. Runs that have
    a result are skipped, and interrupted runs continue. So call the function again to continue after an interruption,
    to repeat failed runs, or to add methods and seeds. With the same seed, all methods start from the same student and
    see the same images in the same order. The best method is chosen on the validation split. Results are reported on
    the test split, if the student's config has a different data set for it.

    Args:
        student_config (str, Path or Config): Config of the student: ``pkg::path``, a file, or a loaded config. Data,
            schedule and optimizer come from this config.
        teacher_config (str, Path or Config): Config of the teacher.
        teacher_checkpoint (str): Weights of the teacher: a path, a URL, or ``'zoo'``. Defaults to ``'zoo'``.
        presets (list[str], optional): Presets to compare. The student alone is always compared. Defaults to all
            presets, or to none if there are ``arms``.
        arms (dict[str, dict], optional): Methods of your own by name, called arms. The keys of an arm are ``preset``,
            ``distill`` (pairs), ``init_from_teacher`` and ``custom_hooks`` as in :func:`.distill`, ``custom_imports``
            as in configs, and ``loss_weight``: a number, or a dict by pair if the preset has several pairs. Defaults to
            None.
        seeds (list[int]): Seeds of each method. Defaults to ``(0, 1, 2)``.
        schedule (float): Factor of all lengths of the training, such as epochs and learning-rate steps. Defaults to 1.
        jobs (int, optional): Number of parallel runs. Defaults to one per GPU, or without GPUs, one per CPU core.
        work_dir (str or Path): Folder of the comparison. Defaults to ``'work_dirs/compare'``.
        metric (str, optional): Metric to compare, such as ``'coco/bbox_mAP'``; higher must be better. Defaults to the
            main metric of the evaluator.
        list_runs (bool): Start nothing, print one shell command per missing run, and summarize the results that exist.
            Defaults to False.
        cfg_options (dict, optional): Overrides of the student's config.

    Returns:
        dict: The comparison:

        * ``rows``: table rows, as strings by column; ``conclusion``: the significant differences in words.
        * ``results``: one dict per run, as in ``results.jsonl``.
        * ``best``: name of the best method on the validation split; None without results.
        * ``not_applicable``: presets that cannot distill this pair of models, with the reasons.
        * ``missing``: names of runs without a result.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If a config, data or the weights do not exist.
        ValueError: If a setting is invalid, no method applies to this pair of models, or the folder was made with
            different settings.
        BlockingIOError: If another comparison is running in the folder.
    """
    student = Config(read_config(student_config, cfg_options).to_dict())  # to_dict() replaces classes by their names
    _check_student(student, schedule, seeds)
    if 'student' in read_config(teacher_config).model:
        raise ValueError('The config of the teacher is a distillation config; give the config of a plain model.')
    methods = _read_methods(presets, arms)
    if teacher_checkpoint == 'zoo' and not isinstance(teacher_config, Config):
        teacher_checkpoint = zoo_checkpoint(str(teacher_config))
    if not isinstance(teacher_config, Config) and '::' not in str(teacher_config):
        teacher_config = Path(teacher_config).resolve()
    root = Path(work_dir).resolve()
    (root / 'configs').mkdir(parents=True, exist_ok=True)
    commands = sys.stdout if list_runs else None
    with lock_folder(root), _output_to_stderr() if list_runs else nullcontext():
        runs = ComparisonRuns(root, student, teacher_config, teacher_checkpoint, schedule)
        runs.add_methods(methods, seeds, strict=set(arms or ()))
        runs.train(metric, jobs, commands)
        return write_results(runs, metric)


def _check_student(student: Config, schedule: float, seeds: Sequence[int]) -> None:
    if 'student' in student.model:
        raise ValueError(
            'The config of the student is already a distillation config; give the config of a plain model.'
        )
    needed = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'val_dataloader', 'val_evaluator', 'val_cfg')
    missing = [key for key in needed if student.get(key) is None]  # val_cfg may be {}
    if missing:
        raise ValueError(
            f"The student's config has no {missing[0]}: a comparison trains with its settings and chooses the best "
            'method on its validation split.'
        )
    if not schedule > 0:
        raise ValueError(f'schedule={schedule} must be a positive factor, such as 0.5 for half of the training.')
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f'seeds={list(seeds)} must be different numbers (one or more), such as 0 1 2.')


def _read_methods(presets: Optional[Sequence[str]], arms: Optional[dict]) -> Dict[str, Optional[dict]]:
    """Return the settings of all methods by name, the student alone first."""
    known = list_presets()
    for name in presets or ():
        if name not in known and name != BASELINE:
            raise ValueError(f"There is no preset '{name}'; the nearest are {closest_names(name, known)}.")
    chosen = presets if presets is not None else () if arms else known
    methods = {BASELINE: None, **{name: dict(preset=name) for name in chosen if name != BASELINE}}
    for name, settings in (arms or {}).items():
        if name == TEACHER:
            raise ValueError(
                f"An arm cannot be named '{TEACHER}', because the teacher's folder has this name; rename the arm."
            )
        if not ARM_NAME.fullmatch(str(name)):
            raise ValueError(
                f"The name of the arm '{name}' is also the name of a folder: use only letters, digits and . _ = + -, "
                f"such as '{re.sub('[^A-Za-z0-9.=+-]+', '_', str(name))}'."
            )
        if name in methods and settings != methods[name]:
            raise ValueError(
                f"The arm '{name}' has the same name as another method of this comparison; rename the arm."
            )
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"The arm '{name}' must be None, or a dict with some of the keys {', '.join(ARM_KEYS)}.")
        for key in settings or ():
            if key not in ARM_KEYS:
                raise ValueError(
                    f"The arm '{name}' has no key '{key}'; the nearest are {closest_names(key, ARM_KEYS)}."
                )
        methods[name] = settings
    return methods


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Redirect output and logs to stderr, so that stdout contains only the listed commands."""
    handlers = [h for h in MMLogger.get_current_instance().handlers if getattr(h, 'stream', None) is sys.stdout]
    before = sys.stdout
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for handler in handlers:
            handler.setStream(before)
