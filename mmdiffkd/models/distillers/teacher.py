"""The frozen teacher: reads its config, loads its weights, converts the student's images, and computes features."""

import copy
from contextlib import nullcontext
from functools import partial
from logging import WARNING
from math import ceil
from pathlib import Path
from typing import Callable, Dict, List, Literal, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdiffkd.engine.checkpoint import fingerprint, read_checkpoint
from mmdiffkd.engine.weights import load_strict
from mmdiffkd.utils.check_config import ConfigError, Positive, check_arguments, closest_names, in_key
from mmdiffkd.utils.config import get_preprocessor_cfg, get_teacher_cfg, resolve_config, type_name
from mmdiffkd.utils.image_settings import image_size, pipeline_normalization
from mmdiffkd.utils.memory import check_memory
from mmdiffkd.utils.meta_device import QuickInit, build_for_inspection
from mmdiffkd.utils.model_index import zoo_checkpoint, zoo_problem

from ..encoders import PRETRAINED, is_library_model
from .classes import Names, class_names, dataset_classes
from .feature_info import FeatureInfo, forward_fns, infer_pad_divisor, run_box_branch
from .input_renormalizer import PREPROCESSOR_KEYS, InputRenormalizer, Preprocessor, check_preprocessor
from .input_resizer import InputResizer, find_size_divisor
from .optimize_inference import compile_parts, find_mismatch, optimize_for_inference, set_memory_format
from .recorders import ModuleOutputsRecorder, is_roi_tap


class Teacher:
    """Frozen teacher. Not a submodule of the distiller, so the optimizer, checkpoints, EMA and DDP ignore it.

    Any module that is registered in mmengine's ``MODELS`` and runs on images, (N, C, H, W), can be a teacher.

    Args:
        config (str, Path or dict): Config of the teacher, in a form that :func:`mmdiffkd.utils.resolve_config` accepts.
        checkpoint (str): Path or URL of the teacher's weights, ``'zoo'`` for the published weights of an OpenMMLab
            package's config, or ``'pretrained'`` for the weights of a model of timm, torchvision or transformers.
        dtype (str, optional): ``'bfloat16'`` or ``'float16'`` runs the teacher under autocast, and its features are
            then converted to float32. None runs the teacher in the student's precision. Defaults to None.
        channels_last (bool): Whether convolutions use the channels-last memory format, which is faster on CPUs and
            tensor cores. Defaults to True.
        compile (bool): Whether to apply ``torch.compile`` to the modules between taps. Defaults to False.
        data_preprocessor (dict, optional): Keys that replace keys of the teacher's data preprocessor. Needed if the
            teacher's config does not describe how its images are preprocessed. If the dict has a ``type``, it replaces
            the whole preprocessor. Defaults to None.
        metainfo (dict, optional): ``dict(classes=[...])``, the names of the teacher's classes. Needed if neither the
            config nor the checkpoint contains the names. Defaults to None.
        resize (float or str, optional): Factor by which the student's images are resized for the teacher. ``'native'``
            resizes them to the area of the images on which the teacher was trained. The teacher's features are then
            resized to the size of the student's levels. Defaults to None.

    Raises:
        FileNotFoundError, ModuleNotFoundError: If the config cannot be found.
        ValueError: If the config is a distillation config, or a value is invalid.
    """

    @check_arguments
    def __init__(
        self,
        config: Union[str, Path, dict],
        checkpoint: Union[str, Path, None] = None,
        dtype: Literal['bfloat16', 'float16', None] = None,
        channels_last: bool = True,
        compile: bool = False,
        data_preprocessor: Optional[dict] = None,
        metainfo: Optional[dict] = None,
        resize: Union[Positive, Literal['native'], None] = None,
    ):
        self.dtype: Optional[torch.dtype] = dtype and getattr(torch, dtype)
        self.channels_last = channels_last
        self.compile = compile
        self.fingerprint: Optional[str] = None  # hash of the weights, set when the weights are loaded
        self.source = config
        self.checkpoint = checkpoint
        self.metainfo = metainfo
        self.resize = resize
        with in_key('config'):
            self.cfg: Config = resolve_config(config)
        if 'student' in self.cfg.model and 'teacher' in self.cfg.model:
            raise ConfigError(
                'config',
                f': {self.name} is a distillation config. Use the config of the plain model; '
                'tools/model_converters/export_student.py writes the plain config of a distilled student.',
            )
        if checkpoint == 'zoo' and (problem := zoo_problem(config)):
            raise ConfigError('checkpoint', problem)
        if checkpoint == PRETRAINED and not is_library_model(self.cfg.model):
            raise ConfigError(
                'checkpoint',
                f"='{PRETRAINED}' is for models of timm, torchvision and transformers: use 'zoo', a path or a URL.",
            )
        self.preprocessor_cfg = self._preprocessor_cfg(data_preprocessor)
        if is_library_model(self.cfg.model) and not self.preprocessor_cfg.get('mean'):
            raise ConfigError(
                'data_preprocessor',
                f' is missing: {self.name} comes without the mean and std of its images. Set data_preprocessor='
                'dict(mean=[...], std=[...]) for RGB values from 0 to 255.',
            )
        self.taps: Dict[str, FeatureInfo] = {}
        self._model: Optional[nn.Module] = None
        self.renormalize: Optional[InputRenormalizer] = None
        self.resizer: Optional[InputResizer] = None
        self._num_parameters: Optional[int] = None  # set for models of timm, torchvision and transformers
        self._optimized: Optional[nn.Module] = None  # optimized copy of the model, made when the first batch arrives
        self._forward_fn: Optional[Callable] = None  # function that runs the model up to the last tap

    def __deepcopy__(self, memo):
        return self  # copies of the student, such as its EMA model, share the teacher

    def __getstate__(self):
        # pickle only the config and the checkpoint's path: the weights are loaded again when they are needed
        return {**vars(self), '_model': None, '_optimized': None, '_forward_fn': None}

    @property
    def running_model(self) -> nn.Module:
        """The model that computes the features: the original model, or its optimized copy after the first batch."""
        return self.model if self._optimized is None else self._optimized

    @property
    def name(self) -> str:
        """Name of the teacher in messages."""
        return self.source if isinstance(self.source, str) else f'{type_name(self.cfg.model.type)}, given as a dict'

    @property
    def model_cfg(self):
        """Config of the teacher's model, including its registry scope."""
        return get_teacher_cfg(self.cfg)

    @property
    def model(self) -> nn.Module:
        """The model with its weights. It is built on first access, and released when an optimized copy replaces it."""
        if self._model is None:
            self._model = self._build()
        return self._model

    def class_names(self, count: int) -> Names:
        """Return the names of the teacher's classes.

        The names are taken from ``metainfo``, from the data sets of the config, or from a local checkpoint file, in
        this order.

        Args:
            count (int): Number of classes. A list with a different number of names is ignored, because it belongs to a
                different data set.

        Returns:
            tuple[str], optional: The names; None if they are unknown.
        """
        for find in (lambda: class_names(self.metainfo), lambda: dataset_classes(self.cfg), self._checkpoint_classes):
            names = find()
            if names is not None and len(names) == count:
                return names
        return None

    def _checkpoint_classes(self) -> Names:
        if not self.checkpoint or not Path(self.checkpoint).is_file():  # do not download weights only to read the names
            return None
        meta = read_checkpoint(str(self.checkpoint)).get('meta') or {}
        return class_names(meta.get('dataset_meta')) or class_names(meta)

    def _build(self) -> nn.Module:
        if not self.checkpoint:
            if is_library_model(self.model_cfg):
                raise ValueError(
                    f'The teacher ({self.name}) has no weights: set teacher.checkpoint to a path, a URL, or '
                    f"'{PRETRAINED}' for the weights that the library lists."
                )
            raise ValueError(
                f"The teacher ({self.name}) has no weights: set teacher.checkpoint to a path, a URL, or 'zoo' for the "
                'weights in the model index of its package.'
            )
        if is_library_model(self.model_cfg):
            return self._freeze(self._build_encoder())
        source = zoo_checkpoint(self.source) if self.checkpoint == 'zoo' else str(self.checkpoint)
        weights = read_checkpoint(source)['state_dict']
        # fork the random state, so that building the teacher does not change the random numbers of the run
        with torch.random.fork_rng(devices=[]), QuickInit():
            model = MODELS.build(self.model_cfg)
        load_strict(model, weights, f'the teacher ({self.name})', f"'{source}'")
        return self._freeze(model)

    def _freeze(self, model: nn.Module) -> nn.Module:
        self.fingerprint = fingerprint(model.state_dict())
        model.eval()  # returns None for some models, such as LAD
        return model.requires_grad_(False)

    def _build_encoder(self) -> nn.Module:
        """Build a model of timm, torchvision or transformers. The wrapper of the library loads the weights."""
        check_memory(self.name, self._num_parameters or count_parameters(build_for_inspection(self.model_cfg)))
        cfg = copy.deepcopy(self.model_cfg)
        cfg.backbone.checkpoint = str(self.checkpoint)
        try:
            with torch.random.fork_rng(devices=[]), QuickInit():
                return MODELS.build(cfg)
        except ConfigError as error:  # an error about the weights: the config has already been built without weights
            raise ValueError(error.problem.lstrip(': ')) from error

    def _preprocessor_cfg(self, changes: Optional[dict]) -> Optional[dict]:
        """Return the config of the teacher's preprocessor, after applying the user's changes.

        Args:
            changes (dict, optional): Argument ``data_preprocessor`` of the teacher.
        """
        self.preprocessor_changes = changes = dict(changes or {})
        cfg = {} if 'type' in changes else dict(get_preprocessor_cfg(self.cfg) or {})
        cfg.update(changes)
        if cfg.get('type') and self.model_cfg.get('_scope_') and '_scope_' not in cfg:
            cfg['_scope_'] = self.model_cfg['_scope_']
        with in_key('data_preprocessor' if changes else 'config.model.data_preprocessor'):
            check_preprocessor(cfg)
        if not changes:
            return cfg
        unknown = [key for key in changes if key not in PREPROCESSOR_KEYS]
        if unknown and not cfg.get('type'):
            nearest = closest_names(unknown[0], PREPROCESSOR_KEYS)
            raise ConfigError(f'data_preprocessor.{unknown[0]}', f' is not a known key; the nearest are {nearest}.')
        try:
            if cfg.get('type'):
                MODELS.build(copy.deepcopy(cfg))
            Preprocessor(cfg).pixel_map(3)
        except Exception as error:
            name = cfg.get('type') or 'the teacher'
            raise ConfigError('data_preprocessor', f'={changes} does not fit {name}: {error}') from error
        return cfg

    def expect(self, student_preprocessor: Optional[dict], taps: Dict[str, FeatureInfo], channels: int = 3) -> None:
        """Set the taps, and prepare the conversion of the student's images for the teacher.

        Args:
            student_preprocessor (dict, optional): Config of the student's data preprocessor.
            taps (dict[str, FeatureInfo]): Features of the teacher's taps, from the dry run.
            channels (int): Number of channels of the student's images. Defaults to 3.

        Raises:
            ValueError: If the student's images cannot be converted for the teacher.
        """
        self.taps = taps
        self.renormalize = InputRenormalizer(
            student_preprocessor,
            self.preprocessor_cfg,
            (channels, next(iter(taps.values())).image_channels),
            pipeline_normalization(self.cfg),
        )
        if is_library_model(self.model_cfg) or self.resize is not None:  # sizes are rounded, not padded
            self.resizer = self._make_resizer(taps)
            self.renormalize.turn_off_padding()
            self.renormalize.notes += self.resizer.notes
        else:
            self.renormalize.find_padding(partial(infer_pad_divisor, self.model_cfg, taps))
        for note in filter(None, [self.renormalize.color_note, *self.renormalize.notes]):
            print_log(note, logger='current')

    def _make_resizer(self, taps: Dict[str, FeatureInfo]) -> InputResizer:
        native = image_size(self.cfg)
        if self.resize == 'native' and not self._tells_size():
            raise ConfigError(
                'resize', f"='native': the config of {self.name} does not set the size of its images; give a factor."
            )
        if not is_library_model(self.model_cfg):
            divisor = infer_pad_divisor(self.model_cfg, taps, self.renormalize.pad_divisor)
        else:
            model = build_for_inspection(self.model_cfg).to('meta').eval()
            divisor = find_size_divisor(model, taps, native)
            self._num_parameters = count_parameters(model)
        return InputResizer(self.resize, native, divisor, self.name)

    def _tells_size(self) -> bool:
        return bool(self.cfg.get('image_size') or self.cfg.get('train_dataloader'))

    def input_size(self, size: Sequence[int]) -> Tuple[int, int]:
        """Return the height and width of the teacher's images.

        Args:
            size (tuple[int, int]): Height and width of the student's images.
        """
        return self.renormalize.padded_size(size) if self.resizer is None else self.resizer.size(size)

    @torch.no_grad()
    def features(
        self, inputs: Tensor, data_samples: Optional[Sequence] = None, rois: Optional[Tensor] = None
    ) -> Dict[str, List[Tensor]]:
        """Compute the features of all taps. The forward pass ends at the last tap.

        Args:
            inputs (Tensor): The student's preprocessed images, (N, C, H, W).
            data_samples (list, optional): Data samples of the images.
            rois (Tensor, optional): RoIs that the student has sampled, (R, 5). Needed for taps in a RoI head.

        Returns:
            dict[str, list[Tensor]]: The levels of every tap, each (N, C, H, W). If the student's images were padded or
                resized for the teacher, the features are cropped or resized to fit the student's images.
        """
        images = self.renormalize(inputs, data_samples)
        is_resized = self.resizer is not None and self.input_size(inputs.shape[-2:]) != tuple(inputs.shape[-2:])
        if is_resized:
            images = self.resizer(images)
            factors = [new / old for new, old in zip(images.shape[-2:], inputs.shape[-2:])]
            data_samples = _with_batch_shape(data_samples, tuple(images.shape[-2:]), factors)
            if rois is not None:
                rois = rois * rois.new_tensor([1, factors[1], factors[0], factors[1], factors[0]])
        is_padded = not is_resized and images.shape[-2:] != inputs.shape[-2:]
        if is_padded:
            data_samples = _with_batch_shape(data_samples, tuple(images.shape[-2:]))
        if self._optimized is None:
            warning = self.renormalize.check_range(inputs, data_samples)
            if warning:
                print_log(warning, 'current', WARNING)
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
        if is_resized:
            features = {
                path: [
                    self.resizer.restore(level, stride, inputs.shape[-2:])
                    for level, stride in zip(levels, self.taps[path].strides)
                ]
                if not path.startswith('roi_head')
                else levels
                for path, levels in features.items()
            }
        if is_padded:
            features = {
                path: [_crop(level, images.shape[-2:], inputs.shape[-2:]) for level in levels]
                if not path.startswith('roi_head')
                else levels
                for path, levels in features.items()
            }
        return features

    def _optimize(self, images: Tensor, data_samples: Optional[Sequence], rois: Optional[Tensor]) -> nn.Module:
        """Return an optimized copy of the model, or the model itself if optimization fails or changes the features."""
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
            except Exception as error:  # optimization is optional: use the original model if it fails
                obstacle = f'the optimized model fails ({error})'
        if obstacle is None:
            model, self._model = optimized, None  # release the original weights
        else:
            # the copy shares the model's weights and has changed their memory format: restore the format
            set_memory_format(model, torch.contiguous_format)
            print_log(f'Teacher optimization is off: {obstacle}. Using the original, slower model.', logger='current')
        if self.compile:
            if model is self._model:  # keep the original uncompiled: compile a copy that shares its weights
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


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(weight.numel() for weight in model.parameters())


def _crop(feature: Optional[Tensor], padded: Sequence[int], size: Sequence[int]) -> Optional[Tensor]:
    """Crop the feature map of padded images to the part without padding.

    Args:
        feature (Tensor, optional): Feature map, (N, C, H', W'). None and maps of 1x1 are returned unchanged.
        padded (tuple[int, int]): Height and width of the padded images.
        size (tuple[int, int]): Height and width of the images without this padding.
    """
    if feature is None or feature.shape[-2:] == (1, 1):
        return feature
    height, width = (ceil(side * cells / whole) for side, cells, whole in zip(size, feature.shape[-2:], padded))
    return feature[..., :height, :width]


def _with_batch_shape(
    data_samples: Optional[Sequence], shape: Tuple[int, int], factors: Optional[Sequence[float]] = None
) -> Optional[Sequence]:
    """Return copies of data samples with the image sizes of the teacher's batch. DETR computes masks from these sizes.

    Args:
        data_samples (list, optional): Data samples of the student.
        shape (tuple[int, int]): Height and width of the teacher's images, for ``batch_input_shape``.
        factors (list[float], optional): Factors by which height and width were resized, for ``img_shape``. None keeps
            ``img_shape``. Defaults to None.
    """
    if not isinstance(data_samples, (list, tuple)):
        return data_samples
    copies = []
    for sample in data_samples:
        metainfo = getattr(sample, 'metainfo', {})
        if 'batch_input_shape' in metainfo:
            sample = copy.copy(sample)
            sample.set_metainfo(dict(batch_input_shape=shape))
            if factors and 'img_shape' in metainfo:
                sides = zip(metainfo['img_shape'], factors, shape)
                sample.set_metainfo(
                    dict(img_shape=tuple(min(round(side * factor), whole) for side, factor, whole in sides))
                )
        copies.append(sample)
    return copies
