from typing import Annotated, Optional, Sequence

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.visualization import MLflowVisBackend, Visualizer
from torch import nn

from mmdiffkd.models import DiffusionOutput, DistillRecord
from mmdiffkd.registry import HOOKS
from mmdiffkd.utils.check_config import Limits, check_arguments
from mmdiffkd.visualization.feature_panels import draw_features, draw_steps

from ..checkpoint import PREFIX
from .utils import require_distiller


@HOOKS.register_module()
class DiffKDVisualizationHook(Hook):
    """Draw student, noised, denoised and teacher features, and the errors before and after denoising.

    The hook draws the first image of a batch in the first iteration and then every ``interval`` iterations. For each
    pair and level, it sends a picture named ``diffkd.<pair>.<level>`` and a strip of the denoising steps named
    ``diffkd.<pair>.<level>.steps`` to all backends of the visualizer. The report needs mmengine's ``LocalVisBackend``,
    which every OpenMMLab config has: this backend writes the pictures to files in ``vis_data/vis_image`` of the run.

    The hook draws the features that the iteration has computed. It runs no model and does not change the training.
    Pairs whose neck does not return a ``DiffusionOutput`` are skipped. Without a teacher, the hook does nothing.

    Args:
        interval (int): Number of iterations between pictures. If an iteration is not distilled (see
            ``DistillScheduleHook``) or its features are not finite (see ``NonFiniteHook``), the hook draws the next
            iteration instead. Defaults to 500.

    Raises:
        ValueError: If ``interval`` is below 1.
    """

    priority = 'LOW'

    @check_arguments
    def __init__(self, interval: Annotated[int, Limits(1)] = 500):
        self.interval = interval
        self._is_due = False

    def before_train(self, runner: Runner) -> None:
        """Check that the model is a distiller.

        Raises:
            ValueError: If the model is not a distiller.
        """
        require_distiller(runner, self)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None) -> None:
        """Make the distiller record its features if a picture is due."""
        if is_main_process() and (runner.iter == 0 or self.every_n_train_iters(runner, self.interval)):
            self._is_due = True
        if self._is_due:
            require_distiller(runner, self).distill_state.capture = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None, outputs: Optional[dict] = None
    ) -> None:
        """Draw the recorded features."""
        model = require_distiller(runner, self)
        state = model.distill_state
        record, state.last_record, state.capture = state.last_record, None, False
        if record is None or not _is_finite(record):
            return
        self._is_due = False
        step = runner.iter + 1
        image = model.diffkd_teacher.renormalize.displayed(record.images[:1])[0].cpu()
        for pair, levels in record.outputs.items():
            for level, output in levels.items():
                label, name = f'{pair}, level {level}', f'{PREFIX}{pair}.{level}'
                _add_image(runner.visualizer, name, draw_features(label, image, output, step), step)
                strip = draw_steps(label, output, _timesteps(model.diffkd[pair], output), step)
                if strip is not None:
                    _add_image(runner.visualizer, f'{name}.steps', strip, step)


def _is_finite(record: DistillRecord) -> bool:
    """Return whether all features to draw are finite: infinity and NaN cannot be converted to colors."""
    outputs = [output for levels in record.outputs.values() for output in levels.values()]
    drawn = [feature[0] for o in outputs for feature in (o.student_latent, o.denoised, o.teacher_latent, *o.trajectory)]
    return all(feature.isfinite().all() for feature in drawn)


def _timesteps(neck: nn.Module, output: DiffusionOutput) -> Sequence[int]:
    """Return the timesteps of the denoising steps, or the step numbers if ``neck.describe()`` has no timesteps."""
    return neck.describe()[0].get('steps') or range(len(output.trajectory) - 1)


def _add_image(visualizer: Visualizer, name: str, picture: np.ndarray, step: int) -> None:
    """Add an image to all backends. The name gets a file extension for MLflow, which uses the name as a file name."""
    for backend in visualizer._vis_backends.values():
        is_mlflow = isinstance(backend, MLflowVisBackend)
        backend.add_image(f'{name}_{step}.png' if is_mlflow else name, picture, step)
