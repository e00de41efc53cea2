"""Convolutional encoder and decoder between images and a grid of feature vectors, as a VQ-VAE's codebook needs.

Source: van den Oord, Vinyals & Kavukcuoglu 2017 (arXiv:1711.00937), sec. 4.1: strided 4x4 convolutions, then residual
blocks of ReLU, 3x3 convolution, ReLU and 1x1 convolution, all of one width and without normalization; the decoder is
the mirror image. Chosen here, where the paper is silent: a 1x1 convolution to the codes' length at the encoder's end
and a 3x3 one from it at the decoder's start, and a ReLU after the residual blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_generative.networks.checks import check_counts, check_divisible, check_shape
from lit_generative.recipe import Recorded


class ConvFeatureEncoder(Recorded, nn.Module):
    """Images to feature maps, without activation at the end.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        dim: Channels of the feature maps, D.
        width: Channels in between.
        num_stages: How often the size is halved.
        num_blocks: Residual blocks after that.

    Attributes:
        grid_size: Height and width of the feature maps.

    Raises:
        ValueError: If ``image_size`` cannot be halved so often, there is no stage, or fewer than no block.
    """

    def __init__(
        self, image_size: int, channels: int, dim: int, width: int = 64, num_stages: int = 2, num_blocks: int = 2
    ) -> None:
        super().__init__()
        check_counts("ConvFeatureEncoder", channels=channels, dim=dim, width=width)
        self.grid_size = _grid_size("ConvFeatureEncoder", image_size, num_stages, num_blocks)
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes: int | None = None
        self.dim = dim
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1)]
        for _ in range(num_stages - 1):
            layers += [nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)]
        layers += [_Block(width) for _ in range(num_blocks)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Encode images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Returns:
            Feature maps, ``(N, D, h, w)``, with ``h = w = grid_size``.

        Raises:
            ValueError: If ``x`` has another shape.
        """
        check_shape(self, x, self.sample_shape)
        features: Tensor = self.layers(x)
        return features


class ConvFeatureDecoder(Recorded, nn.Module):
    """Feature maps to parameters of the likelihood: the mirror image of :class:`ConvFeatureEncoder`.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        dim: Channels of the feature maps, D.
        width: Channels in between.
        num_stages: How often the size is doubled.
        num_blocks: Residual blocks before that.
        parameters_per_value: How many numbers the likelihood needs for one value of the image.

    Attributes:
        grid_size: Height and width of the feature maps.

    Raises:
        ValueError: If ``image_size`` cannot be halved so often, there is no stage, or fewer than no block.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        dim: int,
        width: int = 64,
        num_stages: int = 2,
        num_blocks: int = 2,
        parameters_per_value: int = 1,
    ) -> None:
        super().__init__()
        check_counts("ConvFeatureDecoder", channels=channels, dim=dim, width=width)
        check_counts("ConvFeatureDecoder", parameters_per_value=parameters_per_value)
        self.grid_size = _grid_size("ConvFeatureDecoder", image_size, num_stages, num_blocks)
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes: int | None = None
        self.dim = dim
        layers: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1)]
        layers += [_Block(width) for _ in range(num_blocks)]
        for after in [width] * (num_stages - 1) + [channels * parameters_per_value]:
            layers += [nn.ReLU(), nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Decode feature maps.

        Args:
            z: Feature maps, ``(N, D, h, w)``, with ``h = w = grid_size``.

        Returns:
            What the likelihood interprets, without activation, ``(N, parameters_per_value * C, H, W)``.

        Raises:
            ValueError: If ``z`` has another shape.
        """
        check_shape(self, z, (self.dim, self.grid_size, self.grid_size))
        parameters: Tensor = self.layers(z)
        return parameters


class _Block(nn.Module):
    """ReLU, 3x3 convolution, ReLU and 1x1 convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _grid_size(name: str, image_size: int, num_stages: int, num_blocks: int) -> int:
    """Height and width of the feature maps."""
    if num_stages < 1:
        raise ValueError(f"{name}: num_stages must be at least 1, got {num_stages}.")
    if num_blocks < 0:
        raise ValueError(f"{name}: num_blocks must not be negative, got {num_blocks}.")
    check_divisible(name, image_size, 2**num_stages, "2**num_stages")
    return image_size >> num_stages
