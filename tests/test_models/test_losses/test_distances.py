import pytest
import torch

from mmdiffkd.models import AttentionMSELoss, ChannelWiseDivergence, DISTLoss, KLDivergence, MSELoss, PKDLoss

DISTANCES = [MSELoss, AttentionMSELoss, KLDivergence, DISTLoss, PKDLoss, ChannelWiseDivergence]


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
