"""Find the images and the data samples among the arguments of a student's ``loss``."""

import inspect
from collections.abc import Mapping
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

BATCH_KEYS = ('inputs', 'data_samples')  # keys of the dict that a data preprocessor returns


def find_images(arguments) -> Iterator[Tensor]:
    """Yield the image batches in nested arguments, in order: all floating-point tensors with four dimensions."""
    if isinstance(arguments, Tensor):
        if arguments.dim() == 4 and arguments.is_floating_point():
            yield arguments
    elif isinstance(arguments, (Mapping, list, tuple)):
        for member in arguments.values() if isinstance(arguments, Mapping) else arguments:
            yield from find_images(member)


def use_own_names(loss: Callable, kwargs: dict) -> dict:
    """Rename the arguments ``inputs`` and ``data_samples`` to the names in the signature of a student's ``loss``.

    mmengine's data preprocessors return a dict with these two keys, but mmdet's ``loss`` has ``batch_inputs`` and
    ``batch_data_samples``.
    """
    if not any(name in kwargs for name in BATCH_KEYS):
        return kwargs
    names = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return kwargs
        names.update({key: name for key in BATCH_KEYS if name.endswith(f'_{key}') and key not in names})
        names.update({key: key for key in BATCH_KEYS if name == key})
    return {names.get(key, key): value for key, value in kwargs.items()}


def choose_images(args: Sequence, kwargs: dict, encoded: Sequence[Tensor]) -> Optional[Tensor]:
    """Choose the images for the teacher.

    Usually, these are the first image batch among the arguments of ``loss``. Some models encode different images, such
    as the second of two views, all views in one batch, or images that ``loss`` flips, crops, mixes or reorders. For
    these models, the teacher gets the input of the student's encoder.

    If ``loss`` only changes the colors of the images, for example normalizes them, or combines them with other inputs,
    the teacher still gets the first image batch.

    Args:
        args (Sequence): Positional arguments of ``loss``.
        kwargs (dict): Keyword arguments of ``loss``.
        encoded (Sequence[Tensor]): Images that the student's encoder received, one batch per call.

    Returns:
        Tensor, optional: The images, (N, C, H, W). None if there are no images.
    """
    found = list(find_images((args, kwargs)))
    if not found or not encoded:
        return next(iter([*found, *encoded]), None)
    first, seen = found[0], encoded[0]
    same = next((images for images in found if _is_same(seen, images)), None)
    if same is not None:
        return same
    if len(encoded) > 1 and sum(map(len, encoded)) == len(first):  # the model encodes the batch in several parts
        return first
    is_stacked = len(seen) == len(first) and seen.size(1) != first.size(1)
    is_sum = len(found) > 1 and seen.shape == first.shape
    return first if is_stacked or is_sum or _is_recolored(seen, first) else seen


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.data_ptr() == b.data_ptr())


def _is_recolored(a: Tensor, b: Tensor) -> bool:
    """Return whether two batches show the same images with different colors, for example before and after normalizing.

    Each channel of one batch must be correlated with the same channel of the other batch.
    """
    if a.shape != b.shape:
        return False
    a, b = (images[..., ::4, ::4].float().flatten(2) for images in (a, b))
    a, b = (values - values.mean(2, keepdim=True) for values in (a, b))
    products = (a * b).sum(2).abs()
    return bool((products >= 0.99 * a.norm(dim=2) * b.norm(dim=2)).all())  # 0 >= 0 for images of a single color


def find_data_samples(args: Sequence, kwargs: dict, images: Tensor):
    """Return the data samples among the arguments of ``loss``, of whatever type.

    Args:
        args (Sequence): Positional arguments of ``loss``.
        kwargs (dict): Keyword arguments of ``loss``.
        images (Tensor): The images that were chosen for the teacher.

    Returns:
        Any: The argument whose name ends with ``data_samples``, or else the second argument. None if there is no such
        argument. Also None if the data samples do not belong to the images: the images are one of several views, one
        frame of a clip, or were changed by the model.
    """
    for argument in (*args, *kwargs.values()):
        if argument is images:
            samples = _named_samples(kwargs)
            return args[1] if samples is None and len(args) > 1 else samples
        for key, member in argument.items() if isinstance(argument, Mapping) else ():
            if member is images:
                samples = _named_samples(kwargs)
                if samples is None:
                    samples = args[1] if len(args) > 1 else _named_samples(argument)
                # images in a dict have their samples in a dict with the same keys, such as 'sup' and 'unsup_student'
                return samples.get(key, samples) if isinstance(samples, Mapping) else samples
    return None


def _named_samples(values: Mapping):
    return next((value for name, value in values.items() if str(name).endswith('data_samples')), None)


def take_samples(data_samples, rows: Optional[Tensor]):
    """Select the data samples of some images.

    Args:
        data_samples (Any): Data samples of the batch.
        rows (Tensor, optional): Indices of the images. None selects all images.

    Returns:
        Any: The selected samples. None if samples of this type cannot be indexed by image.
    """
    if rows is None:
        return data_samples
    if isinstance(data_samples, (list, tuple)):
        return [data_samples[row] for row in rows.tolist()]
    return data_samples[rows.to(data_samples.device)] if isinstance(data_samples, Tensor) else None


def as_data_elements(data_samples, images: Tensor) -> List[BaseDataElement]:
    """Return one data sample per image for the teacher.

    If the samples are not a list of mmengine's ``BaseDataElement``, blank samples replace them. A blank sample keeps
    the ``img_shape`` of the sample that it replaces.

    Args:
        data_samples (Any): Data samples of the student.
        images (Tensor): The teacher's images, (N, C, H, W).

    Returns:
        list[BaseDataElement]: N samples.
    """
    is_list = isinstance(data_samples, (list, tuple)) and len(data_samples) == len(images)
    if is_list and all(isinstance(sample, BaseDataElement) for sample in data_samples):
        return list(data_samples)
    shapes = map(_img_shape, data_samples) if is_list else [None] * len(images)
    size = tuple(images.shape[-2:])
    return [blank_sample(*size, img_shape=shape or size) for shape in shapes]


def _img_shape(sample) -> Optional[Tuple[int, int]]:
    """Return ``img_shape``, the image's height and width without padding, from a sample of any type; None if unset."""
    for source in (sample, getattr(sample, 'metainfo', None)):
        shape = source.get('img_shape') if isinstance(source, Mapping) else getattr(source, 'img_shape', None)
        if isinstance(shape, (list, tuple)):
            return tuple(shape[:2])
    return None


def blank_sample(*size: int, img_shape: Optional[Tuple[int, int]] = None) -> BaseDataElement:
    """Create a data sample without labels.

    Args:
        *size (int): Height and width of the image with padding.
        img_shape (tuple[int, int], optional): Height and width without padding. None if there is no padding.
    """
    shape = img_shape or size
    return BaseDataElement(
        metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    )


def valid_pixel_mask(data_samples, ignore_index: Optional[int]) -> Optional[Tensor]:
    """Return a mask of the pixels whose label is not ``ignore_index``. Padded pixels have this label, too.

    Args:
        data_samples (list or Tensor, optional): Samples with ``gt_sem_seg``, (1, H, W) each, or the labels of the
            batch, (N, H, W) or (N, 1, H, W).
        ignore_index (int, optional): The ignored label, from :func:`.find_ignore_index`. None ignores no label.

    Returns:
        Tensor, optional: (N, 1, H, W) of type bool, True for valid pixels. None if ``ignore_index`` is None, or if
        there are no labels.
    """
    if ignore_index is None:
        return None
    if isinstance(data_samples, Tensor):
        is_map = data_samples.dim() in (3, 4) and not data_samples.is_floating_point()
        labels = list(data_samples.reshape(len(data_samples), -1, *data_samples.shape[-2:])) if is_map else []
    else:
        labels = list(map(_labels, data_samples)) if isinstance(data_samples, (list, tuple)) else []
    if not labels or any(label is None or label.shape != labels[0].shape for label in labels):
        return None
    return torch.stack([label != ignore_index for label in labels])


def _labels(sample) -> Optional[Tensor]:
    """Return the semantic labels of one image, (1, H, W), from a sample of any type."""
    value = sample.get('gt_sem_seg') if isinstance(sample, Mapping) else getattr(sample, 'gt_sem_seg', None)
    labels = value if isinstance(value, Tensor) else getattr(value, 'data', None)
    return labels.reshape(-1, *labels.shape[-2:]) if isinstance(labels, Tensor) and labels.dim() in (2, 3) else None
