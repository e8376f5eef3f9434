"""Configs of the runs of a comparison."""

import copy
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Union

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from mmdiffkd.cli import shorten_path
from mmdiffkd.utils import closest_names, get_custom_imports, get_model_cfg, read_config
from mmdiffkd.utils.config import flatten_settings

from .build import build_distiller
from .distill import Source, distillation_config

# settings in epochs or iterations, which scale_schedule() multiplies by the factor
TRAIN_LENGTHS = ('max_epochs', 'max_iters', 'val_interval', 'val_begin')
SCHEDULER_LENGTHS = ('begin', 'end', 'milestones', 'T_max', 'periods', 'step_size', 'total_iters', 'total_steps')
HOOK_LENGTHS = dict(
    DistillScheduleHook=('begin', 'end', 'warmup', 'decay'),
    EMAHook=('begin_epoch', 'begin_iter'),
    PipelineSwitchHook=('switch_epoch',),
    YOLOXModeSwitchHook=('num_last_epochs',),
)
UNLIMITED = 10**9  # mmengine's value of `end` for a scheduler without an end
NOT_SET = 'not set'


def make_method_config(student: Config, settings: Optional[dict], teacher: Source, checkpoint: str) -> Config:
    """Return the config of a method with the student's schedule. With ``settings=None``, it trains the student alone.

    Raises:
        ValueError: If ``settings`` has a ``loss_weight`` that does not fit the pairs.
    """
    settings = copy.deepcopy(settings)
    if settings is None:
        cfg, settings = copy.deepcopy(student), {}
    else:
        cfg = distillation_config(
            student,
            teacher,
            checkpoint,
            settings.get('distill'),
            settings.get('preset'),
            settings.get('init_from_teacher'),
        )
    cfg = Config(cfg.to_dict())
    if settings.get('custom_imports'):
        _add_imports(cfg, Config(dict(custom_imports=settings['custom_imports'])))
    if settings.get('loss_weight') is not None:
        _set_loss_weight(cfg, settings['loss_weight'])
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or ()), *settings.get('custom_hooks', ())]
    is_by_epoch = 'max_epochs' in cfg.train_cfg
    cfg.default_hooks = cfg.get('default_hooks') or {}
    hooks = cfg.default_hooks
    interval = (hooks.get('checkpoint') or {}).get(
        'interval', 1 if is_by_epoch else cfg.train_cfg.get('val_interval', 1)
    )
    hooks.checkpoint = dict(type='mmdiffkd.CheckpointHook', by_epoch=is_by_epoch, interval=interval, max_keep_ckpts=1)
    # logs validations with their epoch or iteration as the step
    hooks.logger = {'type': 'LoggerHook', **(hooks.get('logger') or {}), 'log_metric_by_epoch': is_by_epoch}
    visualizer = cfg.get('visualizer')
    if visualizer is not None:  # the results are read from the files of LocalVisBackend
        backends = visualizer.get('vis_backends') or []
        if not any(backend['type'].endswith('LocalVisBackend') for backend in backends):
            visualizer.vis_backends = [*backends, dict(type='LocalVisBackend')]
    for key in ('work_dir', 'resume', 'experiment_name'):
        cfg.pop(key, None)
    return cfg


def _add_imports(cfg: Config, other: Config) -> None:
    """Add the ``custom_imports`` of another config, and import them."""
    names = get_custom_imports(other)
    import_modules_from_strings(names)
    cfg.custom_imports = dict(imports=[*get_custom_imports(cfg), *names, 'mmdiffkd'], allow_failed_imports=False)


def _set_loss_weight(cfg: Config, weight: Union[float, str, Dict[str, Union[float, str]]]) -> None:
    """Set the loss weight of pairs: a number if there is a single pair, or a dict by the names of the pairs.

    Raises:
        ValueError: If ``weight`` is a number and there are several pairs, or no pair has one of the names.
    """
    necks = {name: pair.neck for name, pair in build_distiller(cfg)[1].pairs.items()}
    pairs = list(necks)
    if not isinstance(weight, dict):
        if len(pairs) > 1:
            raise ValueError(
                f'loss_weight={weight} is for a method with one pair, but there are {", ".join(pairs)}; write '
                f'loss_weight=dict({pairs[0]}={weight}).'
            )
        weight = {pairs[0]: weight}
    for name in weight:
        if name not in pairs:
            raise ValueError(f"loss_weight: there is no pair '{name}'; the nearest are {closest_names(name, pairs)}.")
    distill = cfg.model.get('distill') or {}
    cfg.model.distill = {name: distill.get(name, {}) for name in pairs}
    for name, value in weight.items():
        # the loss weight is an argument of the distance, or of the neck if it has no distance
        key = 'loss_kd.loss_weight' if 'loss_kd' in necks[name] else 'loss_weight'
        cfg.merge_from_dict({f'model.distill.{name}.neck.{key}': value})


def scale_schedule(cfg: Config, factor: float) -> Config:
    """Multiply the lengths of a training by a factor; epochs and iterations are rounded, and stay at least 1.

    Args:
        cfg (Config): Config of a run.
        factor (float): Factor of the epochs or iterations, the intervals of validations and checkpoints, the
            learning-rate schedule, and hooks with epochs or iterations.

    Returns:
        Config: A new config.
    """
    cfg = Config(cfg.to_dict())
    if factor == 1:
        return cfg
    train = cfg.train_cfg
    _scale(train, TRAIN_LENGTHS, factor)
    if train.get('dynamic_intervals'):
        train.dynamic_intervals = [tuple(_scaled(value, factor) for value in pair) for pair in train.dynamic_intervals]
    _scale(cfg.default_hooks.checkpoint, ('interval',), factor)
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in _dicts(schedulers):
        _scale(scheduler, SCHEDULER_LENGTHS, factor)
        if scheduler.get('end') is not None and scheduler.get('begin') is not None:
            scheduler['end'] = max(scheduler['end'], scheduler['begin'] + 1)
    for hook in cfg.get('custom_hooks') or ():
        _scale(hook, HOOK_LENGTHS.get(str(hook['type']).split('.')[-1], ()), factor)
    return cfg


def _scale(settings: dict, keys: Sequence[str], factor: float) -> None:
    settings.update({key: _scaled(settings[key], factor) for key in keys if settings.get(key) is not None})


def _scaled(value, factor: float):
    if isinstance(value, (list, tuple)):
        return [_scaled(member, factor) for member in value]
    if value <= 0 or value >= UNLIMITED:
        return value
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def _dicts(value) -> Iterator[dict]:
    """Yield the schedulers of ``param_scheduler``, which may be a dict, a list, or lists by optimizer."""
    if isinstance(value, dict) and 'type' in value:
        yield value
    else:
        for member in value.values() if isinstance(value, dict) else value:
            yield from _dicts(member)


def has_test_split(cfg: Config) -> bool:
    """Return whether the test data of a config have annotations and are not the validation data."""
    if any(cfg.get(key) is None for key in ('test_dataloader', 'test_evaluator', 'test_cfg')):
        return False
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
    if any(evaluator.get('format_only') for evaluator in evaluators):
        return False
    return cfg.test_dataloader.get('dataset') != cfg.val_dataloader.get('dataset')


def test_on_validation(cfg: Config) -> Config:
    """Return a config that tests on the validation split."""
    cfg = Config(cfg.to_dict())
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, dict(type='TestLoop')
    return cfg


def make_teacher_config(student: Config, teacher: Source) -> Config:
    """Return a config that tests the teacher on the validation split of the student."""
    cfg, teacher = test_on_validation(student), Config(read_config(teacher).to_dict())
    cfg.model = get_model_cfg(teacher)
    cfg.custom_hooks, cfg.load_from = [], None
    for key in ('work_dir', 'resume', 'experiment_name'):
        cfg.pop(key, None)
    imports = dict.fromkeys(
        name for source in (cfg, teacher) for name in (source.get('custom_imports') or {}).get('imports', ())
    )
    if imports:
        cfg.custom_imports = dict(imports=list(imports), allow_failed_imports=False)
    return cfg


def check_same(file: Path, cfg: Config) -> None:
    """Raise an error if the config file of a run has different settings than this call.

    ``custom_imports`` are not compared. They belong to the file that defines the methods, and two such files can define
    the same method but import different modules for their remaining methods.

    Raises:
        ValueError: With the first differences.
    """
    before = flatten_settings(Config.fromfile(file, import_custom_modules=False).to_dict())
    now = flatten_settings(
        Config.fromstring(Config(cfg.to_dict(), format_python_code=False).pretty_text, '.py').to_dict()
    )
    keys = [key for key in dict.fromkeys([*before, *now]) if not key.startswith('custom_imports')]
    differ = [key for key in keys if before.get(key, NOT_SET) != now.get(key, NOT_SET)]
    if differ:
        # the first settings are the likely causes
        differ.sort(key=lambda key: not key.startswith(('train_cfg', 'model', 'optim_wrapper')))
        listed = '; '.join(
            f'{key} was {before.get(key, NOT_SET)!r} and is {now.get(key, NOT_SET)!r}' for key in differ[:3]
        )
        more = f' and {len(differ) - 3} more' if len(differ) > 3 else ''
        raise ValueError(
            f'{shorten_path(file)} exists with different settings: {listed}{more}. Choose another --work-dir, or '
            'give the same settings.'
        )


def config_text(cfg: Config) -> str:
    """Return the formatted text of a config."""
    return Config(cfg.to_dict()).pretty_text
