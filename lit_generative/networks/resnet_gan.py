"""Residual generator and discriminator of SNGAN and WGAN-GP, for images of 32, 48, 64 and 128 pixels.

Source: Miyato et al. 2018 (arXiv:1802.05957), App. B, tables 3 to 6, and Gulrajani et al. 2017 (arXiv:1704.00028),
App. F. The tables of the first have no row for 64 pixels: that one is the second's. Spectral normalization is no part
of these networks; it is put on from outside.

Class labels enter the generator by conditional batch norm (Dumoulin et al. 2017, arXiv:1610.07629; de Vries et al.
2017, arXiv:1707.00683), the discriminator by projection (Miyato & Koyama 2018, arXiv:1802.05637).
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_generative.networks.checks import check_label
from lit_generative.recipe import Recorded


class _Layout(NamedTuple):
    """Channels of the stages as multiples of ``width``, and the papers' widths."""

    base_size: int
    base: int
    up: tuple[int, ...]
    down: tuple[int, ...]
    same: tuple[int, ...]
    generator_width: int
    discriminator_width: int


_LAYOUTS = {
    32: _Layout(4, 1, (1, 1, 1), (1, 1), (1, 1), 256, 128),
    48: _Layout(6, 8, (4, 2, 1), (1, 2, 4, 8), (8,), 64, 64),
    64: _Layout(4, 8, (8, 4, 2, 1), (1, 2, 4, 8), (8,), 64, 64),
    128: _Layout(4, 16, (16, 8, 4, 2, 1), (1, 2, 4, 8, 16), (16,), 64, 64),
}


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift are looked up by class.

    Args:
        channels: Channels of the input, C.
        num_classes: How many classes; each starts with scale 1 and shift 0.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Normalize ``x``, ``(N, C, H, W)``, then scale and shift it by the classes ``y``, ``(N,)`` int64."""
        return self.norm(x) * self.scale(y)[:, :, None, None] + self.shift(y)[:, :, None, None]


class ResNetGenerator(Recorded, nn.Module):
    """Latents to images: residual blocks that double the size by nearest upsampling, with batch norm and ReLU.

    Args:
        image_size: Height and width in pixels: 32, 48 (starts from 6x6), 64 or 128.
        channels: Image channels.
        latent_dim: Length of ``z``.
        width: Channels of the last block; those before have up to 16 times as many, at 32 pixels all have the same.
            None takes the papers' 256 at 32 pixels (SNGAN; WGAN-GP has 128), else 64.
        num_classes: How many classes a label may name; None for an unconditional generator.

    Raises:
        ValueError: If ``image_size`` is none of the four.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        latent_dim: int = 128,
        width: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        layout = _layout("ResNetGenerator", image_size)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        width = layout.generator_width if width is None else width
        widths = [width * multiple for multiple in (layout.base, *layout.up)]
        self.base_shape = (widths[0], layout.base_size, layout.base_size)
        self.base = nn.Linear(latent_dim, math.prod(self.base_shape))
        self.blocks = nn.ModuleList(
            _GeneratorBlock(before, after, num_classes) for before, after in itertools.pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Conv2d(widths[-1], channels, 3, padding=1)
        for layer in (self.base, self.head):
            _initialize(layer)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Generate images.

        Args:
            z: Latents, ``(N, latent_dim)``.
            y: Class labels, ``(N,)`` int64; None if and only if the generator is unconditional.

        Returns:
            Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        check_label(self, self.num_classes, y)
        x: Tensor = self.base(z).unflatten(1, self.base_shape)
        for block in self.blocks:
            x = block(x, y)
        return torch.tanh(self.head(F.relu(self.norm(x))))


class ResNetDiscriminator(Recorded, nn.Module):
    """Images to logits: residual blocks with average pooling, a sum over all positions, a linear layer.

    The sum is SNGAN's; WGAN-GP takes the mean there.

    Args:
        image_size: Height and width in pixels: 32, 48, 64 or 128.
        channels: Image channels.
        width: Channels of the first block; those after have up to 16 times as many, at 32 pixels all have the same.
            None takes the papers' 128 at 32 pixels, else 64.
        num_classes: How many classes a label may name; None for an unconditional discriminator.
        normalization: ``none``, or ``layer`` for WGAN-GP's layer norm before every ReLU but those of the first block
            and the head.

    Raises:
        ValueError: If ``image_size`` is none of the four, or ``normalization`` neither of the two.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        width: int | None = None,
        num_classes: int | None = None,
        normalization: Literal["none", "layer"] = "none",
    ) -> None:
        super().__init__()
        layout = _layout("ResNetDiscriminator", image_size)
        if normalization not in ("none", "layer"):
            raise ValueError(f"ResNetDiscriminator: normalization must be 'none' or 'layer', got {normalization!r}.")
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        width = layout.discriminator_width if width is None else width
        widths = [width * multiple for multiple in (*layout.down, *layout.same)]
        blocks: list[nn.Module] = [_FirstBlock(channels, widths[0])]
        for i, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            blocks.append(_DiscriminatorBlock(before, after, i < len(layout.down), normalization == "layer"))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 1)
        _initialize(self.head)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, widths[-1])
        if self.embedding is not None:
            nn.init.xavier_uniform_(self.embedding.weight)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Judge images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            y: Class labels, ``(N,)`` int64; None if and only if the discriminator is unconditional.

        Returns:
            Logits, large for real, ``(N,)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or ``x`` has another shape.
        """
        check_label(self, self.num_classes, y)
        if tuple(x.shape[1:]) != self.sample_shape:
            # The sum over positions would take any size.
            raise ValueError(
                f"ResNetDiscriminator: built for images of shape {self.sample_shape}, got {tuple(x.shape[1:])}."
            )
        features = F.relu(self.blocks(x)).sum(dim=(2, 3))
        logits: Tensor = self.head(features).squeeze(dim=1)
        if self.embedding is not None:
            # Miyato & Koyama 2018, eq. 3.
            logits = logits + (self.embedding(y) * features).sum(dim=1)
        return logits


class _GeneratorBlock(nn.Module):
    """Norm, ReLU, nearest upsampling, convolution, norm, ReLU, convolution; added to the upsampled input."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(width) if num_classes is None else ConditionalBatchNorm2d(width, num_classes)
            for width in (in_channels, out_channels)
        )
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        _initialize_block(self)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        labels = () if y is None else (y,)
        h = F.interpolate(F.relu(self.norms[0](x, *labels)), scale_factor=2, mode="nearest")
        h = self.conv2(F.relu(self.norms[1](self.conv1(h), *labels)))
        # A 1x1 convolution before nearest upsampling gives what it gives after, for a quarter of the work.
        return h + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


class _DiscriminatorBlock(nn.Module):
    """Norm, ReLU, convolution, twice, and average pooling if it halves the size; added to the input."""

    def __init__(self, in_channels: int, out_channels: int, down: bool, normalized: bool) -> None:
        super().__init__()
        # One group and one scale per channel: Ba et al. 2016 (arXiv:1607.06450) over C, H and W.
        self.norm1 = nn.GroupNorm(1, in_channels) if normalized else nn.Identity()
        self.norm2 = nn.GroupNorm(1, in_channels) if normalized else nn.Identity()
        # Chosen here: the channels change in the second convolution.
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.pool = nn.AvgPool2d(2) if down else nn.Identity()
        changes = down or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()
        _initialize_block(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        h = self.pool(self.conv2(F.relu(self.norm2(h))))
        # Pooling before the 1x1 convolution gives what it gives after, for a quarter of the work.
        return h + self.shortcut(self.pool(x))


class _FirstBlock(nn.Module):
    """The block that reads the image: no norm or ReLU before its first convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        _initialize_block(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))


def _layout(name: str, image_size: int) -> _Layout:
    if image_size not in _LAYOUTS:
        sizes = ", ".join(str(size) for size in _LAYOUTS)
        raise ValueError(f"{name}: image_size must be one of {sizes}, got {image_size}. Resize the images to one.")
    return _LAYOUTS[image_size]


def _initialize_block(block: nn.Module) -> None:
    """Chosen here: Glorot & Bengio 2010, times He's factor of the root of 2 where a ReLU comes before."""
    for name, layer in block.named_children():
        if isinstance(layer, nn.Conv2d):
            _initialize(layer, gain=1.0 if name == "shortcut" else math.sqrt(2))


def _initialize(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
