import numpy as np
import pytest
import torch

from mmdiffkd.models import DistillContext, FeatureDiffusionNeck
from mmdiffkd.visualization import draw_features, draw_steps

TIMESTEPS = [400, 300, 200, 100, 0]


def output_of(size=(6, 9), **options):
    torch.manual_seed(0)
    neck = FeatureDiffusionNeck(8, 16, **options)
    return neck(torch.randn(2, 8, *size), torch.randn(2, 16, *size), DistillContext(capture=True))


def differs(picture, other):
    return picture.shape != other.shape or (picture != other).any()


def test_comparison_depends_on_image_and_features():
    image, output = torch.rand(3, 48, 72), output_of()
    picture = draw_features('fpn, level 0', image, output, 7)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert picture.shape[1] > 4 * picture.shape[0]  # seven panels in a row
    assert not differs(picture, draw_features('fpn, level 0', image, output, 7))
    for name in ('denoised', 'teacher_latent', 'student_latent'):
        changed = output._replace(**{name: getattr(output, name).flip(3)})
        assert differs(picture, draw_features('fpn, level 0', image, changed, 7)), name
    assert differs(picture, draw_features('fpn, level 0', image.flip(2), output, 7))


def test_only_the_first_image_is_drawn():
    image, output = torch.rand(3, 48, 72), output_of()
    changed = output._replace(teacher_latent=torch.cat([output.teacher_latent[:1], -output.teacher_latent[1:]]))
    assert not differs(draw_features('fpn', image, output, 7), draw_features('fpn', image, changed, 7))


def test_four_panels_and_no_steps_without_denoising():
    image, output = torch.rand(3, 48, 72), output_of(denoise=False)
    plain, denoised = draw_features('fpn', image, output, 7), draw_features('fpn', image, output_of(), 7)
    assert plain.shape[1] == pytest.approx(denoised.shape[1] * 4 / 7, rel=0.01)
    assert draw_steps('fpn', output, (), 7) is None


def test_steps_are_drawn_in_a_row():
    output = output_of()
    strip = draw_steps('fpn', output, TIMESTEPS, 7)
    assert strip.shape[1] > 5 * strip.shape[0]
    samples = [*output.trajectory]
    samples[3] = samples[3].flip(3)
    assert differs(strip, draw_steps('fpn', output._replace(trajectory=samples), TIMESTEPS, 7))


def test_vectors_are_drawn_as_curves():
    image, output = torch.rand(3, 48, 48), output_of(size=(1, 1))
    picture = draw_features('logits', image, output, 7)
    assert differs(picture, draw_features('logits', image, output._replace(denoised=-output.denoised), 7))
    assert draw_steps('logits', output, TIMESTEPS, 7) is None
