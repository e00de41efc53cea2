"""DCGAN's convolutional generator and discriminator, for any image size 8, 16, 32, 64, ...

Source: Radford, Metz & Chintala 2016 (arXiv:1511.06434). Class labels are not in that paper: the generator gets them by
concatenation (Mirza & Osindero 2014, arXiv:1411.1784), the discriminator by projection (Miyato & Koyama 2018,
arXiv:1802.05637).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lit_generative.networks.checks import check_label
from lit_generative.recipe import Recorded

_LOWEST_SIZE = 4
_MAX_WIDENING = 8


class DCGANGenerator(Recorded, nn.Module):
    """Latents to images: transposed convolutions from 4x4 upwards, with batch norm and ReLU.

    The hidden stages have sizes ``4, 8, ..., image_size / 2``. A small image therefore has few of them (8x8 only one):
    give it a larger ``width``.

    Args:
        image_size: Height and width in pixels: 4 times a power of two, at least 8.
        channels: Image channels.
        latent_dim: Length of ``z``.
        width: Channels of the last hidden stage. They double with every halving of the size, up to ``8 * width``.
        num_classes: How many classes a label may name; None for an unconditional generator.

    Raises:
        ValueError: If ``image_size`` does not fit.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        latent_dim: int = 128,
        width: int = 64,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        widths = _stage_widths("DCGANGenerator", image_size, width)[::-1]
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, latent_dim)
        input_dim = latent_dim if num_classes is None else 2 * latent_dim
        layers: list[nn.Module] = [nn.ConvTranspose2d(input_dim, widths[0], _LOWEST_SIZE, bias=False)]
        for wider, narrower in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(wider, narrower, 4, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.layers.apply(_initialize)

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
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(y).to(z.dtype)], dim=1)
        images: Tensor = self.layers(z[:, :, None, None])
        return images


class DCGANDiscriminator(Recorded, nn.Module):
    """Images to logits: strided convolutions down to 4x4, with leaky ReLU and, but for the first, batch norm.

    Args:
        image_size: Height and width in pixels: 4 times a power of two, at least 8.
        channels: Image channels.
        width: Channels of the first stage. They double with every halving of the size, up to ``8 * width``.
        num_classes: How many classes a label may name; None for an unconditional discriminator.
        batch_norm: False for losses and penalties that look at each example by itself, as WGAN-GP's does.

    Raises:
        ValueError: If ``image_size`` does not fit.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        width: int = 64,
        num_classes: int | None = None,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        widths = _stage_widths("DCGANDiscriminator", image_size, width)
        layers: list[nn.Module] = []
        for i, (narrower, wider) in enumerate(zip([channels, *widths[:-1]], widths, strict=True)):
            normalized = batch_norm and i > 0
            layers.append(nn.Conv2d(narrower, wider, 4, stride=2, padding=1, bias=not normalized))
            layers += [nn.BatchNorm2d(wider)] if normalized else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, _LOWEST_SIZE)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, widths[-1])
        self.apply(_initialize)
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, 0.0, 0.02)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Judge images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            y: Class labels, ``(N,)`` int64; None if and only if the discriminator is unconditional.

        Returns:
            Logits, large for real, ``(N,)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        check_label(self, self.num_classes, y)
        features = self.layers(x)
        logits: Tensor = self.head(features).flatten()
        if self.embedding is not None:
            # Miyato & Koyama 2018, eq. 3.
            logits = logits + (self.embedding(y) * features.sum(dim=(2, 3))).sum(dim=1)
        return logits


def _stage_widths(name: str, image_size: int, width: int) -> list[int]:
    """Channels of the hidden stages, from the largest map, ``image_size / 2``, to the smallest, 4x4."""
    num_stages = (image_size // _LOWEST_SIZE).bit_length() - 1
    if num_stages < 1 or image_size != _LOWEST_SIZE * 2**num_stages:
        below = _LOWEST_SIZE * 2 ** max(num_stages, 1)
        nearest = f"{below} and {2 * below}" if image_size > below else f"{below}"
        raise ValueError(
            f"{name}: image_size must be 4 times a power of two, at least 8, got {image_size}. "
            f"Nearest that fit: {nearest}."
        )
    return [width * min(2**i, _MAX_WIDENING) for i in range(num_stages)]


def _initialize(module: nn.Module) -> None:
    """Weights of the convolutions from ``N(0, 0.02**2)`` (Radford et al. 2016, sec. 4), biases zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
