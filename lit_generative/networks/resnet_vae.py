"""Residual encoder and decoder of a VAE for small images: the deeper pair to :mod:`lit_generative.networks.conv_vae`.

Source: residual blocks with norm and activation before each convolution, He et al. 2016, fig. 4e (arXiv:1603.05027);
group norm, Wu & He 2018 (arXiv:1803.08494), which gives an example the same posterior whatever else is in its batch.
Chosen here: SiLU, and 4x4 convolutions of stride 2 that change size and channels at a stage's end, so that every
shortcut is the identity.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_generative.networks.checks import check_counts, check_label, check_shape, with_label
from lit_generative.networks.conv_vae import join_label, norm_and_activation, stage_widths
from lit_generative.recipe import Recorded


class ResNetEncoder(Recorded, nn.Module):
    """Images to mean and log-variance of a Gaussian posterior.

    A 3x3 convolution reads the image; each stage is ``num_blocks`` residual blocks, then halves the size; norm, SiLU
    and a linear layer read the last maps.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        latent_dim: Length of the latent, D.
        width: Channels of the first stage; every further stage doubles them.
        num_stages: How often the size is halved.
        num_blocks: Residual blocks of a stage.
        num_classes: How many classes a label may name, which enters as one more channel; None for no labels.

    Raises:
        ValueError: If ``image_size`` cannot be halved so often, or ``num_stages`` or ``num_blocks`` is below 1.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int,
        width: int = 32,
        num_stages: int = 2,
        num_blocks: int = 2,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_counts("ResNetEncoder", channels=channels, latent_dim=latent_dim, width=width, num_classes=num_classes)
        self.sample_shape = (channels, image_size, image_size)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        widths = _checked_widths("ResNetEncoder", image_size, width, num_stages, num_blocks)
        self.class_map = None if num_classes is None else nn.Embedding(num_classes, image_size**2)
        layers: list[nn.Module] = [nn.Conv2d(channels + (num_classes is not None), widths[0], 3, padding=1)]
        for before, after in zip(widths, [*widths[1:], widths[-1]], strict=True):
            layers += [_Block(before) for _ in range(num_blocks)]
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, *norm_and_activation(widths[-1]))
        self.head = nn.Linear(widths[-1] * (image_size >> num_stages) ** 2, 2 * latent_dim)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.
            y: Class labels, ``(N,)`` int64; None if and only if there are no classes.

        Returns:
            Mean and logarithm of the variance of the posterior, each ``(N, D)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or ``x`` has another shape.
        """
        check_label(self, self.num_classes, y)
        check_shape(self, x, self.sample_shape)
        mean, logvar = self.head(self.layers(join_label(x, self.class_map, y)).flatten(start_dim=1)).chunk(2, dim=1)
        return mean, logvar


class ResNetDecoder(Recorded, nn.Module):
    """Latents to parameters of the likelihood.

    A linear layer makes the smallest maps; each stage is ``num_blocks`` residual blocks, then doubles the size; norm,
    SiLU and a 3x3 convolution write the image.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        latent_dim: Length of the latent, D.
        width: Channels of the last stage; every stage before has twice as many.
        num_stages: How often the size is doubled.
        num_blocks: Residual blocks of a stage.
        parameters_per_value: How many numbers the likelihood needs for one value of the image.
        num_classes: How many classes a label may name, which is joined to the latent; None for no labels.

    Raises:
        ValueError: If ``image_size`` cannot be halved so often, or ``num_stages`` or ``num_blocks`` is below 1.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        latent_dim: int,
        width: int = 32,
        num_stages: int = 2,
        num_blocks: int = 2,
        parameters_per_value: int = 1,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_counts("ResNetDecoder", channels=channels, latent_dim=latent_dim, width=width, num_classes=num_classes)
        check_counts("ResNetDecoder", parameters_per_value=parameters_per_value)
        self.sample_shape = (channels, image_size, image_size)
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        widths = _checked_widths("ResNetDecoder", image_size, width, num_stages, num_blocks)[::-1]
        lowest = image_size >> num_stages
        layers: list[nn.Module] = [
            nn.Linear(latent_dim + (num_classes or 0), widths[0] * lowest**2),
            nn.Unflatten(1, (widths[0], lowest, lowest)),
        ]
        for before, after in zip(widths, [*widths[1:], widths[-1]], strict=True):
            layers += [_Block(before) for _ in range(num_blocks)]
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
        layers += norm_and_activation(widths[-1])
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels * parameters_per_value, 3, padding=1))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode latents.

        Args:
            z: Latents, ``(N, D)``.
            y: Class labels, ``(N,)`` int64; None if and only if there are no classes.

        Returns:
            What the likelihood interprets, without activation, ``(N, parameters_per_value * C, H, W)``.

        Raises:
            ValueError: If ``y`` is missing or not wanted, or ``z`` has another shape.
        """
        check_shape(self, z, (self.latent_dim,))
        parameters: Tensor = self.layers(with_label(self, z, self.num_classes, y))
        return parameters


class _Block(nn.Module):
    """Norm, SiLU and 3x3 convolution, twice, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [*norm_and_activation(width), nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _checked_widths(name: str, image_size: int, width: int, num_stages: int, num_blocks: int) -> list[int]:
    if num_blocks < 1:
        raise ValueError(f"{name}: num_blocks must be at least 1, got {num_blocks}.")
    return stage_widths(name, image_size, width, num_stages)
