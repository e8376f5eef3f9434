import torch

from benchmarks.accuracy.mgd import MaskedGeneration


def test_of_masked_pixels_the_student_is_not_seen():
    torch.manual_seed(0)
    part = MaskedGeneration(4, 8, mask_ratio=1.0)
    teacher = torch.randn(2, 8, 6, 6)
    losses = [part(torch.randn(2, 4, 6, 6), teacher).losses['loss_kd'] for _ in range(2)]
    assert losses[0] == losses[1]


def test_without_a_mask_it_is_two_convolutions():
    torch.manual_seed(0)
    part = MaskedGeneration(4, 8, mask_ratio=0.0)
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 6, 6)
    output = part(student, teacher)
    expected = part.generation(part.align(student))
    torch.testing.assert_close(output.denoised, expected)
    torch.testing.assert_close(output.losses['loss_kd'], (expected - teacher).square().mean())


def test_a_share_of_the_pixels_is_kept():
    torch.manual_seed(0)
    part = MaskedGeneration(4, 8, mask_ratio=0.65)
    part.generation = torch.nn.Identity()
    latent = part(torch.randn(4, 4, 32, 32), torch.randn(4, 8, 32, 32)).denoised
    kept = latent.abs().sum(1) > 0
    assert abs(kept.float().mean() - 0.35) < 0.03


def test_gradients():
    part = MaskedGeneration(4, 8)
    student = torch.randn(2, 4, 6, 6, requires_grad=True)
    part(student, torch.randn(2, 8, 6, 6)).losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
