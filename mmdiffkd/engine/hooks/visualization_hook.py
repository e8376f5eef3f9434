from typing import Optional, Sequence

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.visualization import MLflowVisBackend, Visualizer

from mmdiffkd.models import FeatureDiffusionNeck
from mmdiffkd.models.distillers.diffkd_distiller import Kept
from mmdiffkd.registry import HOOKS
from mmdiffkd.utils import PREFIX
from mmdiffkd.visualization import draw_comparison, draw_steps

from ..runner_parts import required_distiller


@HOOKS.register_module()
class DiffKDVisualizationHook(Hook):
    """Draw what is compared: student, noised, denoised and teacher features, and the errors before and after.

    Of the first image of a batch, a picture for every pair and level, and a strip of its denoising steps, in the first
    iteration and then every ``interval`` of them. They go to all backends of the visualizer, named
    ``diffkd.<pair>.<level>`` and ``diffkd.<pair>.<level>.steps``. Only mmengine's ``LocalVisBackend``, which every
    OpenMMLab config has, writes them as files, to ``vis_data/vis_image`` of the run, where the report finds them. What
    is drawn is what the iteration computed: nothing is run again, and the training is the same with and without the
    hook. Pairs whose neck is no ``FeatureDiffusionNeck`` are left out. Without a teacher it does nothing.

    Args:
        interval (int): Iterations from picture to picture. Where one of them distils nothing, see
            ``DistillScheduleHook``, or its features are not finite, see ``NonFiniteHook``, the next one is drawn.
            Defaults to 500.

    Raises:
        ValueError: If ``interval`` is below 1.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 500):
        if interval < 1:
            raise ValueError(f'DiffKDVisualizationHook(interval={interval}) must be 1, every iteration, or more.')
        self.interval = interval
        self._is_due = False

    def before_train(self, runner: Runner) -> None:
        """Check the model.

        Raises:
            TypeError: If it is no distiller.
        """
        required_distiller(runner, self)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None) -> None:
        """Ask the distiller to keep what it compares."""
        if is_main_process() and (runner.iter == 0 or self.every_n_train_iters(runner, self.interval)):
            self._is_due = True
        if self._is_due:
            required_distiller(runner, self).keep_outputs = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Optional[dict] = None, outputs: Optional[dict] = None
    ) -> None:
        """Draw it."""
        model = required_distiller(runner, self)
        kept, model.kept, model.keep_outputs = model.kept, None, False
        if kept is None or not _is_finite(kept):
            return
        self._is_due = False
        step = runner.iter + 1
        image = model.diffkd_teacher.renormalise.displayed(kept.images[:1])[0].cpu()
        for pair, levels in kept.outputs.items():
            for level, output in levels.items():
                label, name = f'{pair}, level {level}', f'{PREFIX}{pair}.{level}'
                _add_image(runner.visualizer, name, draw_comparison(label, image, output, step), step)
                strip = draw_steps(label, output, _timesteps(model.diffkd[pair]), step)
                if strip is not None:
                    _add_image(runner.visualizer, f'{name}.steps', strip, step)


def _is_finite(kept: Kept) -> bool:
    """Whether what is drawn is: features that are not have no colours."""
    outputs = [output for levels in kept.outputs.values() for output in levels.values()]
    drawn = [feature[0] for o in outputs for feature in (o.latent, o.refined, o.target, *o.samples)]
    return all(feature.isfinite().all() for feature in drawn)


def _timesteps(neck: FeatureDiffusionNeck) -> Sequence[int]:
    level = neck.levels[0]  # all are built alike
    return level.schedule.timesteps if level.denoise else ()


def _add_image(visualizer: Visualizer, name: str, picture: np.ndarray, step: int) -> None:
    """``Visualizer.add_image``, but for MLflow, which takes the name for a file's and asks for its extension."""
    for backend in visualizer._vis_backends.values():
        is_mlflow = isinstance(backend, MLflowVisBackend)
        backend.add_image(f'{name}_{step}.png' if is_mlflow else name, picture, step)
