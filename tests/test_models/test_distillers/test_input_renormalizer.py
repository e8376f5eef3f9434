import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.testing import demo_mm_inputs

from mmdiffkd.models.distillers.teacher import InputRenormalizer

PYTORCH = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32)
BGR = dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], bgr_to_rgb=False, pad_size_divisor=32)
NONE = dict(pad_size_divisor=32)


@pytest.mark.parametrize('student', [PYTORCH, CAFFE, NONE])
@pytest.mark.parametrize('teacher', [PYTORCH, CAFFE, BGR, NONE])
def test_matches_the_preprocessor_of_the_teacher(student, teacher):
    """The images differ in size, so the batch contains padding."""

    def batch(cfg):
        data = demo_mm_inputs(2, [[3, 48, 64], [3, 60, 40]])
        return DetDataPreprocessor(**cfg)(data, training=True)

    expected, student_batch = batch(teacher)['inputs'], batch(student)
    images = InputRenormalizer(student, teacher)(student_batch['inputs'], student_batch['data_samples'])
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-3)


def test_equal_normalization_returns_the_same_tensor():
    images = torch.randn(1, 3, 4, 4)
    mmpretrain_style = dict(mean=PYTORCH['mean'], std=PYTORCH['std'], to_rgb=True)
    assert InputRenormalizer(PYTORCH, mmpretrain_style)(images, None) is images


def test_input_images_are_not_modified():
    images = torch.randn(1, 3, 4, 4)
    before = images.clone()
    InputRenormalizer(PYTORCH, CAFFE)(images, None)
    torch.testing.assert_close(images, before)
