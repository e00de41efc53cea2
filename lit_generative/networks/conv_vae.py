"""Convolutional encoder and decoder of a VAE for small images (8x8 to 64x64)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_generative.networks.checks import check_counts, check_divisible, check_label, with_label
from lit_generative.recipe import Recorded

_CHANNELS_PER_GROUP = 8


class ConvEncoder(Recorded, nn.Module):
    """Images to mean and log-variance of a Gaussian posterior.

    Each stage is a strided convolution, group norm and SiLU; a linear layer reads the last one. Unlike batch norm,
    group norm gives an example the same posterior whatever else is in its batch.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        latent_dim: Length of the latent, D.
        width: Channels of the first stage; every further stage doubles them.
        num_stages: How often the size is halved.
        num_classes: How many classes a label may name, which enters as one more channel; None for no labels.

    Raises:
        ValueError: If ``image_size`` cannot be halved so often, or there is no stage.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int,
        width: int = 32,
        num_stages: int = 2,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_counts("ConvEncoder", channels=channels, latent_dim=latent_dim, width=width, num_classes=num_classes)
        self.sample_shape = (channels, image_size, image_size)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.class_map = None if num_classes is None else nn.Embedding(num_classes, image_size**2)
        widths = stage_widths("ConvEncoder", image_size, width, num_stages)
        layers: list[nn.Module] = []
        for before, after in zip([channels + (num_classes is not None), *widths[:-1]], widths, strict=True):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), *norm_and_activation(after)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * (image_size >> num_stages) ** 2, 2 * latent_dim)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            y: Class labels, ``(N,)`` int64; None if and only if there are no classes.

        Returns:
            Mean and logarithm of the variance of the posterior, each ``(N, D)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        check_label(self, self.num_classes, y)
        mean, logvar = self.head(self.layers(join_label(x, self.class_map, y)).flatten(start_dim=1)).chunk(2, dim=1)
        return mean, logvar


class ConvDecoder(Recorded, nn.Module):
    """Latents to parameters of the likelihood: the mirror image of :class:`ConvEncoder`.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        latent_dim: Length of the latent, D.
        width: Channels of the last hidden stage; every stage before has twice as many.
        num_stages: How often the size is doubled.
        parameters_per_value: How many numbers the likelihood needs for one value of the image.
        num_classes: How many classes a label may name, which is joined to the latent; None for no labels.

    Raises:
        ValueError: If ``image_size`` cannot be halved so often, or there is no stage.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int,
        width: int = 32,
        num_stages: int = 2,
        parameters_per_value: int = 1,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_counts("ConvDecoder", channels=channels, latent_dim=latent_dim, width=width, num_classes=num_classes)
        check_counts("ConvDecoder", parameters_per_value=parameters_per_value)
        self.sample_shape = (channels, image_size, image_size)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        widths = stage_widths("ConvDecoder", image_size, width, num_stages)[::-1]
        lowest = image_size >> num_stages
        layers: list[nn.Module] = [
            nn.Linear(latent_dim + (num_classes or 0), widths[0] * lowest**2),
            nn.Unflatten(1, (widths[0], lowest, lowest)),
        ]
        for before, after in zip(widths, [*widths[1:], channels * parameters_per_value], strict=True):
            layers += [*norm_and_activation(before), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode latents.

        Args:
            z: Latents, ``(N, D)``.
            y: Class labels, ``(N,)`` int64; None if and only if there are no classes.

        Returns:
            What the likelihood interprets, without activation, ``(N, parameters_per_value * C, H, W)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted.
        """
        parameters: Tensor = self.layers(with_label(self, z, self.num_classes, y))
        return parameters


def join_label(x: Tensor, class_map: nn.Embedding | None, y: Tensor | None) -> Tensor:
    """Put each label's map, ``(H * W,)``, behind the image's channels: ``(N, C, H, W)`` to ``(N, C + 1, H, W)``."""
    if class_map is None:
        return x
    return torch.cat([x, class_map(y).to(x.dtype).view(len(x), 1, *x.shape[2:])], dim=1)


def stage_widths(name: str, image_size: int, width: int, num_stages: int) -> list[int]:
    """Channels of each stage, from the largest map to the smallest.

    Raises:
        ValueError: If there is no stage, or ``image_size`` cannot be halved so often.
    """
    if num_stages < 1:
        raise ValueError(f"{name}: num_stages must be at least 1, got {num_stages}.")
    check_divisible(name, image_size, 2**num_stages, "2**num_stages")
    return [width * 2**i for i in range(num_stages)]


def norm_and_activation(width: int) -> list[nn.Module]:
    """Group norm, of eight channels a group if ``width`` allows it, and SiLU."""
    # The gcd takes fewer, larger groups for a width that no group of eight divides: one of 28 channels for 28.
    groups = math.gcd(width, max(width // _CHANNELS_PER_GROUP, 1))
    return [nn.GroupNorm(groups, width), nn.SiLU(inplace=True)]
