import torch

from benchmarks.accuracy.mgd import MaskedGeneration


def test_masked_pixels_are_excluded():
    torch.manual_seed(0)
    masked_generation = MaskedGeneration(4, 8, mask_ratio=1.0)
    teacher = torch.randn(2, 8, 6, 6)
    losses = [masked_generation(torch.randn(2, 4, 6, 6), teacher).losses['loss_kd'] for _ in range(2)]
    assert losses[0] == losses[1]


def test_without_mask():
    torch.manual_seed(0)
    masked_generation = MaskedGeneration(4, 8, mask_ratio=0.0)
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 6, 6)
    output = masked_generation(student, teacher)
    expected = masked_generation.generation(masked_generation.align(student))
    torch.testing.assert_close(output.denoised, expected)
    torch.testing.assert_close(output.losses['loss_kd'], (expected - teacher).square().mean())


def test_mask_ratio():
    torch.manual_seed(0)
    masked_generation = MaskedGeneration(4, 8, mask_ratio=0.65)
    masked_generation.generation = torch.nn.Identity()
    latent = masked_generation(torch.randn(4, 4, 32, 32), torch.randn(4, 8, 32, 32)).denoised
    visible = latent.abs().sum(1) > 0
    assert abs(visible.float().mean() - 0.35) < 0.03


def test_gradients():
    masked_generation = MaskedGeneration(4, 8)
    student = torch.randn(2, 4, 6, 6, requires_grad=True)
    masked_generation(student, torch.randn(2, 8, 6, 6)).losses['loss_kd'].backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in masked_generation.parameters())
