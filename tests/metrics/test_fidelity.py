"""PSNR and SSIM of single images have the papers' values."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_generative.metrics.fidelity import mean_squared_error, psnr, ssim


def test_the_error_of_each_image_gives_its_signal_to_noise_ratio():
    x = torch.zeros(3, 1, 4, 5, dtype=torch.float64)
    y = torch.stack([torch.full_like(x[0], value) for value in (0.2, 0.02, 0.0)])
    torch.testing.assert_close(mean_squared_error(x, y), torch.tensor([0.04, 0.0004, 0.0], dtype=torch.float64))
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0, math.inf], dtype=torch.float64))
    torch.testing.assert_close(psnr(x, y, data_range=1.0)[0], psnr(x, y)[0] - 20 * math.log10(2))


def test_similarity_is_that_of_the_paper():
    """Equations 13 to 16 of Wang et al. 2004, by convolution with the window without padding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 14, 17, generator=generator, dtype=torch.float64) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    side = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = (side[:, None] * side / side.sum() ** 2).expand(3, 1, 11, 11)

    def local(image):
        return F.conv2d(image, window, groups=3)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mu_x, mu_y = local(x), local(y)
    var_x, var_y = local(x * x) - mu_x**2, local(y * y) - mu_y**2
    covariance = local(x * y) - mu_x * mu_y
    terms = (2 * mu_x * mu_y + c1) * (2 * covariance + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    torch.testing.assert_close(ssim(x, y), terms.flatten(start_dim=1).mean(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert ssim(x[:1], y[:1]).shape == (1,)


def test_images_of_two_shapes_and_small_ones_are_refused():
    x = torch.zeros(2, 1, 16, 16)
    for measure in (mean_squared_error, psnr, ssim):
        with pytest.raises(ValueError, match=r"of one shape \(N, C, H, W\), got \(2, 1, 16, 16\) and \(2, 1, 8, 16\)"):
            measure(x, x[:, :, :8])
    with pytest.raises(ValueError, match=r"at least 11 pixels a side, got \(16, 10\)"):
        ssim(x[..., :10], x[..., :10])
