from types import SimpleNamespace

import pytest
import torch

from mmdiffkd.models import (
    ATLoss,
    AttentionMSELoss,
    ChannelWiseDivergence,
    CosineLoss,
    DISTLoss,
    DKDLoss,
    FeatureDiffusionNeck,
    KLDivergence,
    MSELoss,
    PKDLoss,
)
from mmdiffkd.models.losses.utils import class_labels
from mmdiffkd.models.necks import DistillContext
from mmdiffkd.utils.check_config import ConfigError

DISTANCES = [MSELoss, AttentionMSELoss, KLDivergence, DISTLoss, PKDLoss, ChannelWiseDivergence, CosineLoss, ATLoss]


def maps():
    return torch.randn(2, 4, 3, 5, requires_grad=True), torch.randn(2, 4, 3, 5)


@pytest.mark.parametrize('kind', DISTANCES)
def test_zero_for_equal_features_and_weight_and_gradient(kind):
    student, teacher = maps()
    torch.testing.assert_close(kind()(teacher, teacher), torch.tensor(0.0), atol=1e-5, rtol=0)
    loss = kind()(student, teacher)
    assert loss > 0
    torch.testing.assert_close(kind(loss_weight=3.0)(student, teacher), 3 * loss)
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_cosine_ignores_the_scale_of_a_position_and_invalid_pixels():
    teacher = torch.randn(2, 4, 3, 5)
    scales = torch.rand(2, 1, 3, 5) + 0.1
    loss = CosineLoss()
    torch.testing.assert_close(loss(teacher * scales, teacher), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss(-teacher, teacher), torch.tensor(2.0))
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[0, 1] = True
    student = teacher.clone()
    student[:, :, 1] *= -1
    torch.testing.assert_close(loss(student, teacher, mask), torch.tensor(2.0))
    assert loss(student, teacher, ~mask) < 2 and loss(student, teacher, torch.zeros_like(mask)) == 0


def test_attention_weights_errors_by_teacher_activation():
    teacher = torch.zeros(1, 4, 1, 2)
    teacher[..., 1] = 2.0
    error = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    quiet, active = AttentionMSELoss()(teacher + error, teacher), AttentionMSELoss()(teacher + error.flip(3), teacher)
    weights = 2 * torch.tensor([0.0, 2.0 / 0.5]).softmax(0)
    torch.testing.assert_close(torch.stack([quiet, active]), weights / 2)


def test_attention_of_a_uniform_teacher_is_mse():
    student, teacher = torch.randn(2, 4, 3, 5), torch.ones(2, 4, 3, 5)
    torch.testing.assert_close(AttentionMSELoss()(student, teacher), MSELoss()(student, teacher))


def test_pkd_is_one_minus_the_correlation():
    student, teacher = (feature.detach().double() for feature in maps())
    rows = [feature.transpose(0, 1).flatten(1) for feature in (student, teacher)]
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows)]
    expected = 1 - torch.stack(correlations).mean()
    torch.testing.assert_close(PKDLoss()(student, teacher), expected, atol=1e-5, rtol=0)


def test_cwd_matches_its_definition():
    student, teacher = (feature.detach() for feature in maps())
    tau, total = 4.0, 0.0
    for n in range(2):
        for c in range(4):
            p = (teacher[n, c].flatten() / tau).softmax(0)
            q = (student[n, c].flatten() / tau).softmax(0)
            total += (p * (p / q).log()).sum()
    torch.testing.assert_close(ChannelWiseDivergence(tau=tau)(student, teacher), tau**2 * total / 8)


@pytest.mark.parametrize('kind', [KLDivergence, DISTLoss])
def test_every_pixel_is_a_sample(kind):
    student, teacher = (feature.detach() for feature in maps())
    rows = [feature.permute(0, 2, 3, 1).reshape(-1, 4) for feature in (student, teacher)]
    torch.testing.assert_close(kind()(student, teacher), kind()(*rows))


MASKED = [KLDivergence, DISTLoss, ChannelWiseDivergence]


def mask():
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    valid[:, 1:, 2:] = False
    return valid


@pytest.mark.parametrize('kind', MASKED)
def test_masked_pixels_are_excluded(kind):
    student, teacher = maps()
    all_valid = torch.ones(2, 3, 5, dtype=torch.bool)
    torch.testing.assert_close(kind()(student, teacher, all_valid), kind()(student, teacher))
    loss = kind(tau=2.0)(student, teacher, mask())
    ignored = (~mask()).unsqueeze(1)
    changed = kind(tau=2.0)(student + 9 * torch.randn_like(student) * ignored, teacher + 9 * ignored, mask())
    torch.testing.assert_close(changed, loss)
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient[ignored.expand_as(gradient)].any() and gradient.any()


@pytest.mark.parametrize('kind', [KLDivergence, DISTLoss])
def test_masking_is_the_same_as_removing_pixels(kind):
    student, teacher = (feature.detach() for feature in maps())
    rows = [feature.permute(0, 2, 3, 1)[mask()] for feature in (student, teacher)]
    torch.testing.assert_close(kind(tau=2.0)(student, teacher, mask()), kind(tau=2.0)(*rows))


@pytest.mark.parametrize('kind', MASKED)
def test_fully_masked_batch_and_image(kind):
    student, teacher = maps()
    none_valid = torch.zeros(2, 3, 5, dtype=torch.bool)
    loss = kind()(student, teacher, none_valid)
    assert loss == 0
    loss.backward()
    assert not student.grad.any() and student.grad.isfinite().all()
    one_image = none_valid.clone()
    one_image[0] = True
    torch.testing.assert_close(kind()(student, teacher, one_image), kind()(student[:1], teacher[:1]))


def test_at_ignores_scale_and_channels():
    student, teacher = torch.randn(2, 4, 3, 5), torch.randn(2, 7, 3, 5)
    torch.testing.assert_close(ATLoss()(3 * student, teacher), ATLoss()(student, teacher))
    torch.testing.assert_close(ATLoss()(teacher, 2 * teacher), torch.tensor(0.0))


def test_normalized_cwd_ignores_the_scale_of_channels():
    student, teacher = (feature.detach() for feature in maps())
    loss = ChannelWiseDivergence(normalize=True)
    scale = torch.tensor([1.0, 3.0, 10.0, 100.0]).view(1, 4, 1, 1)
    torch.testing.assert_close(loss(student * scale + 2, teacher), loss(student, teacher), rtol=1e-3, atol=1e-4)
    assert loss(student[:1, :, :1, :1], teacher[:1, :, :1, :1]) == 0


def test_mse_of_the_batch():
    student, teacher = maps()
    expected = (student - teacher).square().sum() / 2
    torch.testing.assert_close(MSELoss(reduction='batchmean')(student, teacher), expected)
    with pytest.raises(ValueError, match="reduction='sum' must be 'mean' or 'batchmean'"):
        MSELoss(reduction='sum')


def test_dkd_terms_make_up_the_kl_divergence():
    """KL(t || s) = TCKD + (1 - p_t) NCKD."""
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    for index in range(6):
        row = slice(index, index + 1)
        terms = DKDLoss(tau=2.0).terms(student[row], teacher[row], labels[row])
        p = (teacher[row] / 2).softmax(1)[0, labels[index]]
        expected = KLDivergence(tau=2.0)(student[row], teacher[row])
        torch.testing.assert_close(terms['tckd'] + (1 - p) * terms['nckd'], expected)


def test_dkd_reductions_and_pixels():
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    loss = DKDLoss()(student, teacher, labels)
    torch.testing.assert_close(DKDLoss(reduction='sum')(student, teacher, labels), 6 * loss)
    as_map = [logits.view(2, 3, 5).transpose(1, 2).unsqueeze(2) for logits in (student, teacher)]
    torch.testing.assert_close(DKDLoss()(*as_map, labels.view(2, 1, 3)), loss)
    torch.testing.assert_close(DKDLoss()(1e3 * student, teacher, labels).isfinite(), torch.tensor(True))


def test_class_labels():
    samples = [SimpleNamespace(gt_label=torch.tensor([3])), SimpleNamespace(gt_label=torch.tensor(1))]
    assert class_labels(samples).tolist() == [3, 1]
    mixed = [SimpleNamespace(gt_label=torch.tensor([3]), gt_score=torch.tensor([0.2, 0.7, 0.0, 0.1]))]
    assert class_labels(mixed).tolist() == [1]
    for unfit in (None, [SimpleNamespace(gt_label=torch.tensor([3, 4]))], [SimpleNamespace()]):
        with pytest.raises(ValueError, match='this loss needs one class per image'):
            class_labels(unfit)


def test_labels_reach_the_loss():
    level = dict(denoise=False, align=False, loss_kd=dict(type='mmdiffkd.DKDLoss'))
    neck, student, teacher = FeatureDiffusionNeck(5, 5, **level), torch.randn(2, 5, 1, 1), torch.randn(2, 5, 1, 1)
    samples = [SimpleNamespace(gt_label=torch.tensor([3])), SimpleNamespace(gt_label=torch.tensor([1]))]
    loss = neck(student, teacher, DistillContext(data_samples=samples)).losses['loss_kd']
    torch.testing.assert_close(loss, DKDLoss()(student, teacher, torch.tensor([3, 1])))
    with pytest.raises(ValueError, match='one class per image'):
        neck(student, teacher)


def test_channels_without_adapter():
    plain = dict(denoise=False, align=False)
    neck = FeatureDiffusionNeck(4, 8, loss_kd=dict(type='mmdiffkd.ATLoss'), **plain)
    assert neck(torch.randn(2, 4, 3, 3), torch.randn(2, 8, 6, 6)).losses['loss_kd'] > 0
    with pytest.raises(ConfigError, match='align=False compares features without an adapter'):
        FeatureDiffusionNeck(4, 8, **plain)
