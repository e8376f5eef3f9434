from typing import Optional, Sequence

import torch
from torch import Tensor


class Renormalisation:
    """Show the teacher the student's images in the teacher's own normalisation and channel order.

    Args:
        student (dict, optional): Config of the student's data preprocessor.
        teacher (dict, optional): Config of the teacher's data preprocessor.
    """

    def __init__(self, student: Optional[dict], teacher: Optional[dict]):
        self.student = _statistics(student)
        self.teacher = _statistics(teacher)
        self.pad_value = float((teacher or {}).get('pad_value', 0) or 0)

    def __call__(self, inputs: Tensor, data_samples: Optional[Sequence]) -> Tensor:
        """Convert a batch; where both normalise alike it is returned as it is.

        Padding is the teacher's pad value again afterwards, as if the teacher had padded the batch itself.

        Args:
            inputs (Tensor): The student's preprocessed images, (N, C, H, W).
            data_samples (list, optional): Their samples; ``img_shape`` tells where padding begins.

        Returns:
            Tensor: The teacher's images, (N, C, H, W).
        """
        if self.student == self.teacher:
            return inputs
        (student_mean, student_std, student_rgb), (teacher_mean, teacher_std, teacher_rgb) = self.student, self.teacher
        images = inputs * _column(student_std, inputs) + _column(student_mean, inputs)
        if student_rgb != teacher_rgb:
            images = images.flip(1)
        images = (images - _column(teacher_mean, inputs)) / _column(teacher_std, inputs)
        for image, sample in zip(images, data_samples or ()):
            shape = getattr(sample, 'metainfo', {}).get('img_shape')
            if shape is not None:
                image[:, shape[0] :] = self.pad_value
                image[:, :, shape[1] :] = self.pad_value
        return images

    def displayed(self, inputs: Tensor) -> Tensor:
        """The student's images as they are shown.

        Args:
            inputs (Tensor): Its preprocessed images, (N, 3, H, W) or (N, 1, H, W).

        Returns:
            Tensor: RGB between 0 and 1, (N, 3, H, W).
        """
        mean, std, is_rgb = self.student
        images = (inputs.float() * _column(std, inputs) + _column(mean, inputs)) / 255
        return (images if is_rgb else images.flip(1)).clamp(0, 1).expand(-1, 3, -1, -1)


def _statistics(preprocessor: Optional[dict]):
    """Mean, standard deviation and whether images are RGB; mmpretrain calls the flag ``to_rgb``."""
    cfg = preprocessor or {}
    mean, std = cfg.get('mean'), cfg.get('std')
    is_rgb = bool(cfg.get('bgr_to_rgb') or cfg.get('to_rgb'))
    return tuple(map(float, mean or (0,))), tuple(map(float, std or (1,))), is_rgb


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
