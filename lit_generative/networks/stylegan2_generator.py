"""StyleGAN2's generator: mapping network, modulated convolutions, noise, and a sum of colours over all sizes.

Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv:1912.04958), and for mapping
network, style mixing, noise and truncation Karras, Laine & Aila 2019 (arXiv:1812.04948). Class labels: Karras et al.
2020, "Training Generative Adversarial Networks with Limited Data" (arXiv:2006.06676).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_generative.networks.checks import LOWEST_SIZE, check_label, check_shape, pyramid_widths
from lit_generative.networks.stylegan2_layers import (
    EqualizedLinear,
    ModulatedConv2d,
    Resample,
    scaled_leaky_relu,
    unit_rms,
)
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import full_precision, to_float32

_MAX_WIDTH = 512
_MAPPING_LR_MULTIPLIER = 0.01
_AVERAGE_DECAY = 0.998


class StyleGAN2Generator(Recorded, nn.Module):
    """Latents to images by way of styles, which scale the channels of every layer.

    In training mode the noise of every layer is fresh, two latents are mixed in most images, and ``w_avg`` follows the
    mean style. In evaluation mode the noise is a buffer that was drawn when the network was built, nothing is mixed,
    and styles are pulled towards ``w_avg``: an image depends on its own latent alone.

    Path length regularization is a term of the loss and no part of this network.

    Args:
        image_size: Height and width in pixels: 4 times a power of two, at least 8.
        channels: Image channels.
        latent_dim: Length of ``z``.
        style_dim: Length of the style ``w``.
        width: Channels at ``image_size``. They double with every halving of the size, up to 512.
        num_mapping_layers: Layers of the mapping network.
        num_classes: How many classes a label may name; None for an unconditional generator.
        style_mixing: Fraction of the images that take their later layers' styles from a second latent, in training.
        truncation: In evaluation mode, how far a style is from the mean one, as a factor: 1 leaves it, 0 makes all
            images alike. The attribute of this name may be changed at any time. The mean is taken over all classes.

    Raises:
        ValueError: If ``image_size`` or ``width`` does not fit, there is no mapping layer, or ``style_mixing`` is not
            in ``[0, 1]``.
    """

    w_avg: Tensor

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        latent_dim: int = 512,
        style_dim: int = 512,
        width: int = 64,
        num_mapping_layers: int = 8,
        num_classes: int | None = None,
        style_mixing: float = 0.9,
        truncation: float = 1.0,
    ) -> None:
        super().__init__()
        widths = pyramid_widths("StyleGAN2Generator", image_size, width, _MAX_WIDTH)[::-1]
        if not 0 <= style_mixing <= 1:
            raise ValueError(f"StyleGAN2Generator: style_mixing must be in [0, 1], got {style_mixing}.")
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        self.style_mixing = style_mixing
        self.truncation = truncation
        self.num_styles = 2 * len(widths)
        self.mapping = MappingNetwork(latent_dim, style_dim, num_mapping_layers, num_classes)
        self.register_buffer("w_avg", torch.zeros(style_dim))
        self.base = nn.Parameter(torch.randn(widths[0], LOWEST_SIZE, LOWEST_SIZE))
        convs = [_StyledConv(widths[0], widths[0], LOWEST_SIZE, style_dim)]
        for i in range(1, len(widths)):
            size = LOWEST_SIZE * 2**i
            convs.append(_StyledConv(widths[i - 1], widths[i], size, style_dim, up=True))
            convs.append(_StyledConv(widths[i], widths[i], size, style_dim))
        self.convs = nn.ModuleList(convs)
        self.to_colours = nn.ModuleList(_ToColours(before, channels, style_dim) for before in widths)
        self.upsample = Resample("up")

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Generate images.

        Args:
            z: Latents, ``(N, latent_dim)``.
            y: Class labels, ``(N,)`` int64; None if and only if the generator is unconditional.

        Returns:
            Images, ``(N, C, H, W)``: trained towards ``[-1, 1]``, but nothing keeps them in it.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or ``z`` has another shape.
        """
        check_label(self, self.num_classes, y)
        check_shape(self, z, (self.latent_dim,))
        return self.synthesize(self.styles(z, y))

    def styles(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Styles of all layers, mixed or truncated: ``z`` of ``(N, latent_dim)`` to ``(N, num_styles, style_dim)``."""
        w = self.mapping(z, y)
        if self.training:
            with torch.no_grad():
                self.w_avg.lerp_(w.mean(dim=0).to(self.w_avg.dtype), 1 - _AVERAGE_DECAY)
            return self._mixed(w, z, y)
        if self.truncation != 1:
            w = self.w_avg.to(w.dtype) + self.truncation * (w - self.w_avg.to(w.dtype))
        return w[:, None].expand(-1, self.num_styles, -1)

    def synthesize(self, w: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` of styles ``(N, num_styles, style_dim)``."""
        x = self.convs[0](self.base.expand(len(w), -1, -1, -1), w[:, 0])
        image = self.to_colours[0](x, w[:, 1])
        for i in range(1, len(self.to_colours)):
            x = self.convs[2 * i - 1](x, w[:, 2 * i - 1])
            x = self.convs[2 * i](x, w[:, 2 * i])
            # Colours share the style of the next size's first convolution.
            image = self.upsample(image) + self.to_colours[i](x, w[:, 2 * i + 1])
        return image

    def _mixed(self, w: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        """Styles ``(N, num_styles, style_dim)`` that go over to those of other latents at a random layer."""
        w = w[:, None].expand(-1, self.num_styles, -1)
        if self.style_mixing == 0:
            return w
        num, device = len(w), w.device
        crossover = torch.randint(1, self.num_styles, (num, 1), device=device)
        unmixed = torch.rand(num, 1, device=device) >= self.style_mixing
        keeps = unmixed | (torch.arange(self.num_styles, device=device) < crossover)
        return torch.where(keeps[:, :, None], w, self.mapping(torch.randn_like(z), y)[:, None])


class MappingNetwork(nn.Module):
    """Latents to styles: both latent and embedded class have unit mean square, and the layers learn 100 times slower.

    Args:
        latent_dim: Length of ``z``.
        style_dim: Length of the style, and of the layers between.
        num_layers: How many layers.
        num_classes: How many classes; None for none.

    Raises:
        ValueError: If there is no layer.
    """

    def __init__(self, latent_dim: int, style_dim: int, num_layers: int = 8, num_classes: int | None = None) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MappingNetwork: needs at least 1 layer, got {num_layers}.")
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, latent_dim)
        dims = [latent_dim if num_classes is None else 2 * latent_dim] + [style_dim] * (num_layers - 1)
        self.layers = nn.ModuleList(EqualizedLinear(dim, style_dim, _MAPPING_LR_MULTIPLIER) for dim in dims)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map ``z``, ``(N, latent_dim)``, and classes ``y``, ``(N,)`` int64, to styles, ``(N, style_dim)``."""
        # Rounding here would show in every pixel, and the layers are small.
        with full_precision(z.device):
            w = unit_rms(to_float32(z))
            if self.embedding is not None:
                w = torch.cat([w, unit_rms(self.embedding(y)).to(w.dtype)], dim=1)
            for layer in self.layers:
                w = scaled_leaky_relu(layer(w))
        return w


class _StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise of a learned strength, bias, leaky ReLU."""

    noise: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise", torch.randn(size, size))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        h = self.conv(x, w)
        noise = torch.randn_like(h[:, :1]) if self.training else self.noise
        added = self.noise_strength * noise + self.bias[:, None, None]
        return scaled_leaky_relu(h + added.to(h.dtype))


class _ToColours(nn.Module):
    """Modulated 1x1 convolution to the image's channels, and bias."""

    def __init__(self, in_channels: int, channels: int, style_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        h = self.conv(x, w)
        return h + self.bias[:, None, None].to(h.dtype)
