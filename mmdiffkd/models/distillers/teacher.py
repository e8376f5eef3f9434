import copy
from contextlib import nullcontext
from typing import Callable, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdiffkd.engine.checkpoint import fingerprint, read_checkpoint
from mmdiffkd.engine.weights import load_strict
from mmdiffkd.utils.config import get_model_cfg, get_preprocessor_cfg, resolve_config, type_name, zoo_checkpoint
from mmdiffkd.utils.meta_device import QuickInit

from .feature_info import FeatureInfo, forward_fns, run_box_branch
from .optimize_inference import compile_parts, find_mismatch, optimize_for_inference, set_memory_format
from .recorders import ModuleOutputsRecorder, is_roi_tap

DTYPES = ('bfloat16', 'float16')


class Teacher:
    """Frozen teacher. Not a submodule of the distiller, so the optimizer, checkpoints, EMA and DDP ignore it.

    Args:
        config (str, Path or dict): See :func:`mmdiffkd.utils.resolve_config`.
        checkpoint (str): Path or URL of its weights, or ``'zoo'``.
        dtype (str, optional): ``'bfloat16'`` or ``'float16'`` runs the teacher under autocast; its features are
            converted to float32. Defaults to None, the student's precision.
        channels_last (bool): Whether convolutions use the channels-last memory format, which is faster on CPUs and
            tensor cores. Defaults to True.
        compile (bool): Whether to apply ``torch.compile`` to the modules between taps. Defaults to False.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: If the config cannot be found, or is a distillation config.
    """

    def __init__(
        self,
        config,
        checkpoint: Optional[str] = None,
        dtype: Optional[str] = None,
        channels_last: bool = True,
        compile: bool = False,
    ):
        if dtype not in (None, *DTYPES):
            raise ValueError(f"teacher.dtype='{dtype}' must be one of {', '.join(map(repr, DTYPES))}.")
        self.dtype: Optional[torch.dtype] = dtype and getattr(torch, dtype)
        self.channels_last = channels_last
        self.compile = compile
        self.fingerprint: Optional[str] = None  # hash of the weights, set when the weights are loaded
        self.source = config
        self.checkpoint = checkpoint
        self.cfg: Config = resolve_config(config)
        if 'student' in self.cfg.model and 'teacher' in self.cfg.model:
            raise ValueError(
                f"The teacher's config ({self.name}) is a distillation config. Use the config of the plain model; "
                'tools/model_converters/export_student.py writes the plain config of a distilled student.'
            )
        self.taps: Dict[str, FeatureInfo] = {}
        self._model: Optional[nn.Module] = None
        self.renormalize: Optional[InputRenormalizer] = None
        self._optimized: Optional[nn.Module] = None  # optimized copy, made with the first batch
        self._forward_fn: Optional[Callable] = None  # runs the model up to the last tap

    def __deepcopy__(self, memo):
        return self  # copies of the student, such as EMA, share the teacher

    def __getstate__(self):
        # pickle the config and the checkpoint's path; the weights are loaded again on first use
        return {**vars(self), '_model': None, '_optimized': None, '_forward_fn': None}

    @property
    def running_model(self) -> nn.Module:
        """The model that computes the features: after the first batch, an optimized copy."""
        return self.model if self._optimized is None else self._optimized

    @property
    def name(self) -> str:
        """Name of the teacher in messages."""
        return self.source if isinstance(self.source, str) else f'{type_name(self.cfg.model.type)}, given as a dict'

    @property
    def model_cfg(self):
        """Config of the model, including its registry scope."""
        return get_model_cfg(self.cfg)

    @property
    def model(self) -> nn.Module:
        """The model with its weights, built on first use and released when an optimized copy replaces it."""
        if self._model is None:
            self._model = self._build()
        return self._model

    def _build(self) -> nn.Module:
        if not self.checkpoint:
            raise ValueError(
                f"The teacher ({self.name}) has no weights: set teacher.checkpoint to a path, a URL, or 'zoo' for the "
                'weights in the model index of its package.'
            )
        source = zoo_checkpoint(self.source) if self.checkpoint == 'zoo' else str(self.checkpoint)
        weights = read_checkpoint(source)['state_dict']
        # fork_rng, so that building the teacher does not change the random numbers of the run
        with torch.random.fork_rng(devices=[]), QuickInit():
            model = MODELS.build(self.model_cfg)
        load_strict(model, weights, f'the teacher ({self.name})', f"'{source}'")
        self.fingerprint = fingerprint(model.state_dict())
        return model.eval().requires_grad_(False)

    def expect(self, student_preprocessor: Optional[dict], taps: Dict[str, FeatureInfo]) -> None:
        """Set the taps, and how the student's images are preprocessed.

        Args:
            student_preprocessor (dict, optional): Config of the student's data preprocessor.
            taps (dict[str, FeatureInfo]): The teacher's taps, from the dry run.
        """
        self.renormalize = InputRenormalizer(student_preprocessor, get_preprocessor_cfg(self.cfg))
        self.taps = taps

    @torch.no_grad()
    def features(
        self, inputs: Tensor, data_samples: Optional[Sequence] = None, rois: Optional[Tensor] = None
    ) -> Dict[str, List[Tensor]]:
        """Compute the features of all taps; the forward pass ends at the last tap.

        Args:
            inputs (Tensor): The student's preprocessed images, (N, 3, H, W).
            data_samples (list, optional): Data samples of the images.
            rois (Tensor, optional): The student's sampled RoIs, (R, 5), for taps in a RoI head.

        Returns:
            dict[str, list[Tensor]]: The levels of every tap, each (N, C, H, W).
        """
        images = self.renormalize(inputs, data_samples)
        if self._optimized is None:
            self._optimized = self._optimize(images, data_samples, rois)
            self._forward_fn = self._forward_fn_of(self._optimized)
        elif next(self._optimized.parameters()).device != inputs.device:
            self._optimized.to(inputs.device)
        precision = torch.autocast(inputs.device.type, self.dtype) if self.dtype else nullcontext()
        with precision:
            features = self._run(self._optimized, self._forward_fn, images, data_samples, rois)
        if self.dtype:
            features = {
                path: [level if level is None else level.float() for level in levels]
                for path, levels in features.items()
            }
        return features

    def _optimize(self, images: Tensor, data_samples: Optional[Sequence], rois: Optional[Tensor]) -> nn.Module:
        """Return an optimized copy of the model, or the model itself if the copy computes different features."""
        model = self.model.to(images.device)
        images = images.float()
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices), torch.autocast(images.device.type, enabled=False):
            expected = self._run(model, self._forward_fn_of(model), images, data_samples, rois)
            try:
                optimized = optimize_for_inference(model, self.channels_last)
                found = self._run(optimized, self._forward_fn_of(optimized), images, data_samples, rois)
                tap = find_mismatch(expected, found)
                obstacle = tap and f"the optimized model computes different features at '{tap}'"
            except Exception as error:  # optimization is optional: use the original model
                obstacle = f'the optimized model fails ({error})'
        if obstacle is None:
            model, self._model = optimized, None  # release the original weights
        else:
            set_memory_format(model, torch.contiguous_format)  # the optimized copy shares the weights: restore them
            print_log(f'Teacher optimization is off: {obstacle}. Using the original, slower model.', logger='current')
        if self.compile:
            if model is self._model:  # compile a copy that shares the weights
                model = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
            compile_parts(model, self.taps)
        return model

    def _forward_fn_of(self, model: nn.Module) -> Callable:
        """Return a function of images, data samples and RoIs that runs a model at least up to the last tap."""
        if any(map(is_roi_tap, self.taps)):
            return lambda images, samples, rois: run_box_branch(model, images, rois)
        (forward_fn,) = {info.forward_fn for info in self.taps.values()}
        run = forward_fns(model)[forward_fn]
        return lambda images, samples, rois: run(images, samples)

    def _run(self, model: nn.Module, run_pass: Callable, images: Tensor, *others) -> Dict[str, List[Tensor]]:
        calls = {path: info.calls for path, info in self.taps.items()}
        with ModuleOutputsRecorder(model, calls, 'teacher', stop_after=calls) as recorder:
            run_pass(images, *others)
        return {path: recorder.features(path, images.shape[-2:], info.tokens) for path, info in self.taps.items()}


class InputRenormalizer:
    """Convert the student's preprocessed images to the teacher's normalization and channel order.

    Args:
        student (dict, optional): Config of the student's data preprocessor.
        teacher (dict, optional): Config of the teacher's data preprocessor.
    """

    def __init__(self, student: Optional[dict], teacher: Optional[dict]):
        self.student = _statistics(student)
        self.teacher = _statistics(teacher)
        self.pad_value = float((teacher or {}).get('pad_value', 0) or 0)

    def __call__(self, inputs: Tensor, data_samples: Optional[Sequence]) -> Tensor:
        """Convert a batch of images, and fill the padded area with the teacher's pad value.

        If student and teacher use the same normalization, the batch is returned unchanged.

        Args:
            inputs (Tensor): The student's preprocessed images, (N, C, H, W).
            data_samples (list, optional): Data samples of the images. ``img_shape`` is the size without padding.

        Returns:
            Tensor: The teacher's images, (N, C, H, W).
        """
        if self.student == self.teacher:
            return inputs
        (student_mean, student_std, student_rgb), (teacher_mean, teacher_std, teacher_rgb) = self.student, self.teacher
        images = inputs * _as_channels(student_std, inputs) + _as_channels(student_mean, inputs)
        if student_rgb != teacher_rgb:
            images = images.flip(1)
        images = (images - _as_channels(teacher_mean, inputs)) / _as_channels(teacher_std, inputs)
        for image, sample in zip(images, data_samples or ()):
            shape = getattr(sample, 'metainfo', {}).get('img_shape')
            if shape is not None:
                image[:, shape[0] :] = self.pad_value
                image[:, :, shape[1] :] = self.pad_value
        return images

    def displayed(self, inputs: Tensor) -> Tensor:
        """Convert the student's preprocessed images to RGB for display.

        Args:
            inputs (Tensor): Preprocessed images, (N, 3, H, W) or (N, 1, H, W).

        Returns:
            Tensor: RGB between 0 and 1, (N, 3, H, W).
        """
        mean, std, is_rgb = self.student
        images = (inputs.float() * _as_channels(std, inputs) + _as_channels(mean, inputs)) / 255
        return (images if is_rgb else images.flip(1)).clamp(0, 1).expand(-1, 3, -1, -1)


def _statistics(preprocessor: Optional[dict]):
    """Return mean, standard deviation and whether images are RGB. In mmpretrain, the flag is called ``to_rgb``."""
    cfg = preprocessor or {}
    mean, std = cfg.get('mean'), cfg.get('std')
    is_rgb = bool(cfg.get('bgr_to_rgb') or cfg.get('to_rgb'))
    return tuple(map(float, mean or (0,))), tuple(map(float, std or (1,))), is_rgb


def _as_channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
