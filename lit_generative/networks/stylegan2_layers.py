"""What StyleGAN2's two networks are made of.

Source: Karras, Laine & Aila 2019 (arXiv:1812.04948) and Karras et al. 2020 (arXiv:1912.04958); equalized learning rate:
Karras et al. 2018 (arXiv:1710.10196), sec. 4.1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_generative.tensor_ops import full_precision, to_float32

_EPSILON = 1e-8


def scaled_leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, times the square root of 2 so that it keeps the variance of a standard normal input."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def unit_rms(x: Tensor) -> Tensor:
    """Scale each row of ``x``, ``(N, D)``, to a mean square of 1 (Karras et al. 2018, sec. 4.2)."""
    return x * (x.square().mean(dim=1, keepdim=True) + _EPSILON).rsqrt()


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are standard normal and scaled when used, so that Adam moves all layers alike.

    Args:
        in_features: Length of the input.
        out_features: Length of the output.
        lr_multiplier: How fast weights and bias learn, as a factor.
        bias: Value that the bias starts at.
    """

    def __init__(self, in_features: int, out_features: int, lr_multiplier: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.lr_multiplier = lr_multiplier
        self.gain = lr_multiplier / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_multiplier))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_features)`` to ``(N, out_features)``."""
        return F.linear(x, self.weight * self.gain, self.bias * self.lr_multiplier)


class Resample(nn.Module):
    """The low-pass filter ``[1, 3, 3, 1]`` in both directions, by itself or with a change of the size.

    Args:
        mode: ``up`` doubles the size, ``down`` halves it, ``after`` follows a 3x3 convolution transposed with stride 2
            (``2 H + 1`` becomes ``2 H``), ``before`` goes ahead of a 3x3 convolution with stride 2 (``H`` becomes
            ``H + 1``).
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = taps[:, None] * taps / taps.sum() ** 2
        # Three of four values are zero before the filter of an upsampling: what it averages is 4 times too small.
        self.register_buffer("kernel", kernel * (4 if mode in ("up", "after") else 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``(N, C, H, W)``; zeros stand around the border."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 4, 4)  # type: ignore[operator]
        if self.mode == "up":
            return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)
        stride = 2 if self.mode == "down" else 1
        return F.conv2d(x, kernel, stride=stride, padding=2 if self.mode == "before" else 1, groups=channels)


class EqualizedConv2d(nn.Module):
    """A convolution with equalized learning rate; it keeps the size or halves it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: 1 or 3.
        down: Halve the size, low-pass filtered before.
        bias: Add a bias, which starts at zero.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, down: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        self.gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        # A 1x1 convolution after filter and stride costs a quarter, and gives the same.
        self.filter = Resample("down" if kernel_size == 1 else "before") if down else nn.Identity()
        strided = down and kernel_size == 3
        self.stride, self.padding = (2, 0) if strided else (1, kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, out_channels, H, W)``, or half of ``H`` and ``W``."""
        return F.conv2d(self.filter(x), self.weight * self.gain, self.bias, self.stride, self.padding)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels are scaled by a style, and whose output is scaled back to unit variance.

    Source: Karras et al. 2020, eq. 1 and 3. There each example has its own weights; here the activations are scaled
    before and after a convolution that the batch shares, which gives the same and is twice as fast on a CPU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: 1 or 3.
        style_dim: Length of the style.
        up: Double the size, low-pass filtered after (``kernel_size`` 3).
        demodulate: Scale back to unit variance; left out in the layer that gives colours.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        up: bool = False,
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        self.demodulate = demodulate
        self.padding = kernel_size // 2
        self.gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.scale = EqualizedLinear(style_dim, in_channels, bias=1.0)
        self.filter = Resample("after") if up else None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: Feature maps, ``(N, in_channels, H, W)``.
            w: Styles, ``(N, style_dim)``.

        Returns:
            ``(N, out_channels, H, W)``, or twice ``H`` and ``W``.
        """
        scale, weight = self.scale(w), self.weight * self.gain
        h = x * scale[:, :, None, None]
        if self.filter is None:
            h = F.conv2d(h, weight, padding=self.padding)
        else:
            h = self.filter(F.conv_transpose2d(h, weight.transpose(0, 1), stride=2))
        if self.demodulate:
            h = h * self._demodulation(scale, weight).to(h.dtype)[:, :, None, None]
        return h

    @staticmethod
    def _demodulation(scale: Tensor, weight: Tensor) -> Tensor:
        """One over the norm of each output channel's scaled weights, ``(N, out_channels)`` (eq. 3)."""
        with full_precision(scale.device):
            squared = to_float32(scale).square() @ to_float32(weight).square().sum(dim=(2, 3)).T
            return (squared + _EPSILON).rsqrt()
