import pytest
import torch
import torch.nn.functional as F

from lit_generative.networks.stylegan2_layers import (
    EqualizedConv2d,
    EqualizedLinear,
    ModulatedConv2d,
    Resample,
    scaled_leaky_relu,
    unit_rms,
)


def test_leaky_relu_is_scaled_by_the_root_of_2():
    torch.testing.assert_close(scaled_leaky_relu(torch.tensor([3.0, -5.0])), torch.tensor([4.2426407, -1.4142136]))


def test_unit_rms_leaves_the_direction_and_makes_the_mean_square_1():
    torch.testing.assert_close(unit_rms(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]) * 2**0.5)


@pytest.mark.parametrize("layer", [EqualizedLinear(300, 500), EqualizedLinear(300, 500, lr_multiplier=0.01)])
def test_equalized_linear_keeps_the_variance_at_the_start(layer):
    torch.manual_seed(0)
    torch.testing.assert_close(layer(torch.randn(200, 300)).std(), torch.tensor(1.0), rtol=0.05, atol=0)


def test_the_learning_rate_multiplier_scales_what_a_step_changes():
    x = torch.randn(1, 9)
    changes = []
    for multiplier in (1.0, 0.01):
        layer = EqualizedLinear(9, 1, lr_multiplier=multiplier, bias=2.0)
        torch.testing.assert_close(layer(torch.zeros(1, 9)), torch.tensor([[2.0]]))
        before = layer(x)
        with torch.no_grad():
            layer.weight += 1
            layer.bias += 1
        changes.append(layer(x) - before)
    torch.testing.assert_close(changes[0], x.sum(dim=1, keepdim=True) / 3 + 1)
    torch.testing.assert_close(changes[1], changes[0] * 0.01, rtol=1e-2, atol=1e-4)


def test_upsampling_is_bilinear_inside_the_border():
    x = torch.randn(2, 3, 5, 7).double()
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    actual = Resample("up").double()(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


def test_downsampling_is_a_quarter_of_the_adjoint_of_upsampling():
    low, high = torch.randn(2, 3, 4, 6).double(), torch.randn(2, 3, 8, 12).double()
    up, down = Resample("up").double(), Resample("down").double()
    torch.testing.assert_close((up(low) * high).sum(), 4 * (low * down(high)).sum())


def test_the_filter_before_a_strided_convolution_has_taps_1_3_3_1_and_adds_a_row():
    x = torch.zeros(1, 1, 4, 6)
    x[0, 0, 2, 3] = 64.0
    out = Resample("before")(x)
    assert out.shape == (1, 1, 5, 7)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(out[0, 0, 1:5, 2:6], taps[:, None] * taps)
    assert out.sum() == 64


def test_an_equalized_convolution_scales_by_the_fan_in_and_adds_the_bias():
    conv = EqualizedConv2d(4, 5, 3).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 4, 6, 7).double()
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight / 6, conv.bias, padding=1))
    assert EqualizedConv2d(4, 5, 3, bias=False).bias is None


def test_a_downsampling_1x1_convolution_filters_and_halves():
    conv, x = EqualizedConv2d(4, 5, 1, down=True).double(), torch.randn(2, 4, 6, 8).double()
    torch.testing.assert_close(conv(x), F.conv2d(Resample("down").double()(x), conv.weight / 2, conv.bias))


def test_a_downsampling_3x3_convolution_is_a_convolution_filtered_and_halved():
    conv, x = EqualizedConv2d(4, 5, 3, down=True).double(), torch.randn(2, 4, 8, 12).double()
    full = F.conv2d(x, conv.weight / 6, padding=1)
    expected = Resample("down").double()(full)
    assert conv(x).shape == (2, 5, 4, 6)
    torch.testing.assert_close(conv(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # they commute but at the border


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("kernel_size", "up"), [(1, False), (3, False), (3, True)])
def test_a_modulated_convolution_has_its_own_weights_for_each_example(kernel_size, up, demodulate):
    torch.manual_seed(0)
    layer = ModulatedConv2d(4, 5, kernel_size, style_dim=6, up=up, demodulate=demodulate).double()
    x, w = torch.randn(3, 4, 5, 7).double(), torch.randn(3, 6).double()
    actual = layer(x, w)
    assert actual.shape == ((3, 5, 10, 14) if up else (3, 5, 5, 7))
    scale = w @ layer.scale.weight.T / 6**0.5 + 1
    for i in range(3):
        weights = layer.weight / (4 * kernel_size**2) ** 0.5 * scale[i][None, :, None, None]  # eq. 1
        if demodulate:
            weights = weights / (weights.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()  # eq. 3
        if up:
            expected = F.conv2d(Resample("up").double()(x[i : i + 1]), weights.flip(2, 3), padding=1)
            torch.testing.assert_close(actual[i : i + 1, :, 2:-2, 2:-2], expected[..., 2:-2, 2:-2])
        else:
            torch.testing.assert_close(actual[i : i + 1], F.conv2d(x[i : i + 1], weights, padding=kernel_size // 2))


def test_demodulation_gives_unit_variance_whatever_the_style():
    torch.manual_seed(0)
    layer = ModulatedConv2d(16, 32, 3, style_dim=8)
    for size in (0.1, 1.0, 100.0):
        out = layer(torch.randn(8, 16, 16, 16), size * torch.randn(8, 8))[..., 1:-1, 1:-1]
        torch.testing.assert_close(out.std(), torch.tensor(1.0), rtol=0.1, atol=0)
