from contextlib import nullcontext
from typing import Callable, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdiffkd.utils import (
    fingerprint,
    load_strict,
    model_of,
    preprocessor_of,
    read_checkpoint,
    resolve_config,
    zoo_checkpoint,
)

from .normalisation import Renormalisation
from .passes import passes
from .probe import TapInfo
from .roi import is_roi_tap, run_box_branch
from .taps import TapRecorder

DTYPES = ('bfloat16', 'float16')


class Teacher:
    """A frozen guest: it is no module of the distiller, so nothing trains, saves, copies, wraps or counts it.

    Args:
        config (str, Path or dict): See :func:`mmdiffkd.utils.resolve_config`.
        checkpoint (str): Path or URL of its weights, or ``'zoo'``.
        dtype (str, optional): ``'bfloat16'`` or ``'float16'`` runs it under autocast. Its features are float32 all the
            same. Defaults to None, the precision that the student runs in.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: If the config cannot be resolved, or is a distiller's.
    """

    def __init__(self, config, checkpoint: Optional[str] = None, dtype: Optional[str] = None):
        if dtype not in (None, *DTYPES):
            raise ValueError(f"teacher.dtype='{dtype}' must be one of {', '.join(map(repr, DTYPES))}.")
        self.dtype: Optional[torch.dtype] = dtype and getattr(torch, dtype)
        self.fingerprint: Optional[str] = None  # of its weights, once they are loaded
        self.source = config
        self.checkpoint = checkpoint
        self.cfg: Config = resolve_config(config)
        if 'student' in self.cfg.model and 'teacher' in self.cfg.model:
            raise ValueError(
                f"The teacher's config ({self.name}) is a distillation config itself; name the config of the plain "
                'model, for a distilled student the one that tools/model_converters/export_student.py writes.'
            )
        self.taps: Dict[str, TapInfo] = {}
        self._model: Optional[nn.Module] = None
        self._renormalise: Optional[Renormalisation] = None
        self._pass: Optional[Callable] = None

    def __deepcopy__(self, memo):
        return self  # copies of the student (EMA) share it

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.source if isinstance(self.source, str) else f'{self.cfg.model.type} given in place'

    @property
    def model_cfg(self):
        """Config of the model, with its own scope."""
        return model_of(self.cfg)

    @property
    def model(self) -> nn.Module:
        """The model with its weights; built on first use, when training starts."""
        if self._model is None:
            self._model = self._build()
        return self._model

    def _build(self) -> nn.Module:
        if not self.checkpoint:
            raise ValueError(
                f"The teacher ({self.name}) has no weights: set teacher.checkpoint to a path, a URL, or 'zoo' for the "
                'weights that its package lists.'
            )
        source = zoo_checkpoint(self.source) if self.checkpoint == 'zoo' else str(self.checkpoint)
        weights = read_checkpoint(source)['state_dict']
        with torch.random.fork_rng(devices=[]):  # the run's random numbers do not depend on the teacher
            model = MODELS.build(self.model_cfg)
        load_strict(model, weights, f'the teacher ({self.name})', f"'{source}'")
        self.fingerprint = fingerprint(model.state_dict())
        return model.eval().requires_grad_(False)

    def expect(self, student_preprocessor: Optional[dict], taps: Dict[str, TapInfo]) -> None:
        """Tell it what it will be asked for.

        Args:
            student_preprocessor (dict, optional): Config of the preprocessor whose output it will see.
            taps (dict[str, TapInfo]): Its taps, from the dry run.
        """
        self._renormalise = Renormalisation(student_preprocessor, preprocessor_of(self.cfg))
        self.taps = taps

    @torch.no_grad()
    def features(
        self, inputs: Tensor, data_samples: Optional[Sequence] = None, rois: Optional[Tensor] = None
    ) -> Dict[str, List[Tensor]]:
        """Run as far as the last tap.

        Args:
            inputs (Tensor): The student's images, (N, 3, H, W).
            data_samples (list, optional): Their data samples.
            rois (Tensor, optional): The student's sampled RoIs, (R, 5), for taps in a RoI head.

        Returns:
            dict[str, list[Tensor]]: The levels of every tap, each (N, C, H, W).
        """
        model = self.model
        if next(model.parameters()).device != inputs.device:
            model.to(inputs.device)
        images = self._renormalise(inputs, data_samples)
        calls = {path: info.calls for path, info in self.taps.items()}
        precision = torch.autocast(inputs.device.type, self.dtype) if self.dtype else nullcontext()
        with precision, TapRecorder(model, calls, 'teacher', stop_after=calls) as recorder:
            if any(map(is_roi_tap, calls)):
                run_box_branch(model, images, rois)
            else:
                if self._pass is None:
                    (way,) = {info.way for info in self.taps.values()}
                    self._pass = passes(model)[way]
                self._pass(images, data_samples)
        size = inputs.shape[-2:]
        features = {path: recorder.features(path, size, info.tokens) for path, info in self.taps.items()}
        if self.dtype:
            features = {
                path: [level if level is None else level.float() for level in levels]
                for path, levels in features.items()
            }
        return features
