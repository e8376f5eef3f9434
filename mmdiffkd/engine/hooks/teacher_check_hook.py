from contextlib import contextmanager
from typing import Dict, Iterator, Optional

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.check_config import check_arguments

from .utils import require_distiller


@HOOKS.register_module()
class TeacherCheckHook(Hook):
    """Evaluate the teacher on the validation set once, before the first iteration.

    Use the hook to find a wrong teacher checkpoint before training. The metrics are logged under ``teacher/``. The
    teacher must predict the classes of the validation set. A resumed run does not repeat the check.

    Args:
        min_score (float, optional): Lowest accepted value of the metric. The run stops if the teacher scores lower.
            With None, the hook only logs the metrics. Defaults to None.
        metric (str, optional): Name of the metric, such as ``'coco/bbox_mAP'``; higher must be better. Defaults to the
            first metric that the evaluator returns.
    """

    @check_arguments
    def __init__(self, min_score: Optional[float] = None, metric: Optional[str] = None):
        self.min_score = min_score
        self.metric = metric

    def before_train(self, runner: Runner) -> None:
        """Evaluate the teacher, on all ranks.

        Raises:
            ValueError: If the model is not a distiller, the config has no validation set, the teacher cannot be
                evaluated on the validation set, or the teacher scores below ``min_score``.
        """
        model = require_distiller(runner, self)
        if runner.iter > 0 or model.diffkd_teacher is None:
            return
        if runner.val_loop is None:
            raise ValueError('TeacherCheckHook needs val_dataloader, val_evaluator and val_cfg in the config.')
        if not hasattr(model.diffkd_teacher.model, 'val_step'):
            raise ValueError(
                f'TeacherCheckHook: the teacher ({model.diffkd_teacher.name}) is an image encoder without predictions; '
                'remove this hook.'
            )
        metrics = self._evaluate(runner, model.diffkd_teacher.model)
        name = self.metric or next(iter(metrics), None)
        if name not in metrics:
            raise ValueError(f"The evaluation of the teacher has no metric '{name}', only {', '.join(metrics)}.")
        teacher = model.diffkd_teacher.name
        print_log(f'Teacher on the validation set: {name} {metrics[name]:.4f} ({teacher})', logger='current')
        runner.visualizer.add_scalars({f'teacher/{key}': value for key, value in metrics.items()}, step=0)
        if self.min_score is not None and not metrics[name] >= self.min_score:
            raise ValueError(
                f'The teacher ({model.diffkd_teacher.name}) reaches {name} {metrics[name]:.4f} on the validation set, '
                f'below min_score={self.min_score}: check its checkpoint, classes and image normalization.'
            )

    @torch.no_grad()
    def _evaluate(self, runner: Runner, teacher: torch.nn.Module) -> Dict[str, float]:
        loader, evaluator = runner.val_dataloader, runner.val_loop.evaluator
        teacher.to(next(runner.model.parameters()).device)
        with torch.random.fork_rng(devices=[]):  # keep the random numbers of the run unchanged
            for batch in loader:
                outputs = teacher.val_step(batch)
                with _explain_lookup_errors():
                    evaluator.process(data_samples=outputs, data_batch=batch)
        with _explain_lookup_errors():
            return evaluator.evaluate(len(loader.dataset))


@contextmanager
def _explain_lookup_errors() -> Iterator[None]:
    """Add the likely cause to lookup errors of an evaluator: the data set lacks classes that the teacher predicts."""
    try:
        yield
    except (IndexError, KeyError) as error:
        raise ValueError(
            'The teacher cannot be evaluated on the validation set, perhaps because it predicts different classes '
            f'({type(error).__name__}: {error}); in that case, remove TeacherCheckHook.'
        ) from error
