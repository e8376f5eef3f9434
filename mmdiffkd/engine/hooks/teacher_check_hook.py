from contextlib import contextmanager
from typing import Dict, Iterator, Optional

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdiffkd.registry import HOOKS

from ..runner_parts import required_distiller


@HOOKS.register_module()
class TeacherCheckHook(Hook):
    """Evaluate the teacher on the validation set once, before the first iteration.

    Its metrics are written to the log under ``teacher/``. A teacher that is no good wastes the whole run. It must
    predict the classes of the validation set. A resumed run does not repeat the check.

    Args:
        floor (float, optional): Lowest value of the metric to go on with. Defaults to None, which only logs.
        metric (str, optional): Its name, such as ``'coco/bbox_mAP'``; higher must be better. Defaults to the first
            one that the evaluator returns.
    """

    def __init__(self, floor: Optional[float] = None, metric: Optional[str] = None):
        self.floor = floor
        self.metric = metric

    def before_train(self, runner: Runner) -> None:
        """Evaluate it, on all ranks.

        Raises:
            TypeError: If the model is no distiller.
            ValueError: If there is no validation set, the teacher cannot be evaluated on it, or it is below the floor.
        """
        model = required_distiller(runner, self)
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
        if self.floor is not None and not metrics[name] >= self.floor:
            raise ValueError(
                f'The teacher ({model.diffkd_teacher.name}) reaches {name} {metrics[name]:.4f} on the validation set, '
                f'below the floor of {self.floor}: look at its checkpoint, its classes and its image normalisation.'
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
