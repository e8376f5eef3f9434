from contextlib import contextmanager
from typing import Dict, Iterator, Optional

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.config import refuse_old_keys

from .utils import require_distiller


@HOOKS.register_module()
class TeacherCheckHook(Hook):
    """Evaluate the teacher on the validation set once, before the first iteration.

    Its metrics are written to the log under ``teacher/``. A teacher that is no good wastes the whole run. It must
    predict the classes of the validation set. A resumed run does not repeat the check.

    Args:
        min_score (float, optional): Lowest value of the metric to go on with. Defaults to None, which only logs.
        metric (str, optional): Its name, such as ``'coco/bbox_mAP'``; higher must be better. Defaults to the first
            one that the evaluator returns.
    """

    def __init__(self, min_score: Optional[float] = None, metric: Optional[str] = None, **old_keys):
        refuse_old_keys(old_keys, 'TeacherCheckHook')
        if old_keys:
            raise TypeError(f"TeacherCheckHook has no argument '{next(iter(old_keys))}'.")
        self.min_score = min_score
        self.metric = metric

    def before_train(self, runner: Runner) -> None:
        """Evaluate it, on all ranks.

        Raises:
            TypeError: If the model is no distiller.
            ValueError: If there is no validation set, or the teacher cannot be evaluated on it or is below
                ``min_score``.
        """
        model = require_distiller(runner, self)
        if runner.iter > 0 or model.diffkd_teacher is None:
            return
        if runner.val_loop is None:
            raise ValueError('TeacherCheckHook needs val_dataloader, val_evaluator and val_cfg in the config.')
        metrics = self._evaluate(runner, model.diffkd_teacher.model)
        name = self.metric or next(iter(metrics), None)
        if name not in metrics:
            raise ValueError(f"The evaluation of the teacher has no metric '{name}', only {', '.join(metrics)}.")
        print_log(f'The teacher ({model.diffkd_teacher.name}): {name} {metrics[name]:.4f}', logger='current')
        runner.visualizer.add_scalars({f'teacher/{key}': value for key, value in metrics.items()}, step=0)
        if self.min_score is not None and not metrics[name] >= self.min_score:
            raise ValueError(
                f'The teacher ({model.diffkd_teacher.name}) reaches {name} {metrics[name]:.4f} on the validation set, '
                f'below min_score={self.min_score}: look at its checkpoint, its classes and its image normalisation.'
            )

    @torch.no_grad()
    def _evaluate(self, runner: Runner, teacher: torch.nn.Module) -> Dict[str, float]:
        loader, evaluator = runner.val_dataloader, runner.val_loop.evaluator
        teacher.to(next(runner.model.parameters()).device)
        with torch.random.fork_rng(devices=[]):  # the run draws what it draws without the check
            for batch in loader:
                outputs = teacher.val_step(batch)
                with _other_classes():
                    evaluator.process(data_samples=outputs, data_batch=batch)
        with _other_classes():
            return evaluator.evaluate(len(loader.dataset))


@contextmanager
def _other_classes() -> Iterator[None]:
    """Evaluators look labels up in the classes of the data set."""
    try:
        yield
    except (IndexError, KeyError) as error:
        raise ValueError(
            'The teacher cannot be evaluated on the validation set, perhaps because it predicts other classes '
            f'({type(error).__name__}: {error}); leave TeacherCheckHook out then.'
        ) from error
