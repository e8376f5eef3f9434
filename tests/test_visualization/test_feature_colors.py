import pytest
import torch

from mmdiffkd.visualization.feature_panels import FeatureColors, cosine_similarity, error_maps


def test_mean_is_gray_and_first_component_is_lightness():
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    reference = torch.linspace(-1, 1, 32).view(1, 4, 8) * direction.view(8, 1, 1) + 3
    rgb = FeatureColors(reference)(reference)
    assert rgb.shape == (4, 8, 3)
    assert torch.allclose(rgb.std(2), torch.zeros(4, 8, dtype=rgb.dtype), atol=1e-5)  # gray: only one component
    light = rgb.mean(2).flatten()
    assert light.mean() == pytest.approx(0.5, abs=1e-3)
    assert (light.diff() > 0).all() or (light.diff() < 0).all()


def test_similar_features_have_similar_colors():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(16, 40, 40, generator=generator)  # more positions than are sampled
    paint = FeatureColors(reference)
    near, far = reference + 0.1 * torch.randn(16, 40, 40, generator=generator), torch.randn(16, 40, 40)
    assert (paint(near) - paint(reference)).abs().mean() < 0.2 * (paint(far) - paint(reference)).abs().mean()
    assert torch.equal(FeatureColors(reference)(reference), paint(reference))


@pytest.mark.parametrize('shape', [(1, 3, 3), (2, 3, 3), (5, 1, 2), (4, 2, 2)])
def test_few_channels_or_positions(shape):
    feature = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rgb = FeatureColors(feature)(feature)
    assert rgb.shape == (*shape[1:], 3) and rgb.isfinite().all() and 0 <= rgb.min() and rgb.max() <= 1


def test_constant_reference_is_gray():
    assert torch.equal(FeatureColors(torch.ones(4, 3, 3))(torch.ones(4, 3, 3)), torch.full((3, 3, 3), 0.5).double())


def test_errors_and_similarity():
    target = torch.ones(2, 1, 2)
    (error,) = error_maps([torch.tensor([[[1.0, 4.0]], [[1.0, 5.0]]])], target)
    assert error.tolist() == [pytest.approx([0, 12.5**0.5])]
    feature = torch.tensor([[[2.0, 1.0]], [[2.0, -1.0]]])
    assert cosine_similarity(feature, target) == pytest.approx(0.5)  # 1 and 0
