"""Convolutional encoder to a grid of Gaussians, as the first stage of latent diffusion needs.

Source: Rombach et al. 2022 (arXiv:2112.10752), app. G: the encoder's last maps hold mean and log-variance of each
place. The layers are those of :mod:`lit_generative.networks.conv_vq`, whose ``ConvFeatureDecoder`` decodes the draws.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_generative.networks.conv_vq import ConvFeatureEncoder
from lit_generative.recipe import Recorded


class ConvMapEncoder(Recorded, nn.Module):
    """Images to maps of means and log-variances.

    Args:
        image_size: Height and width in pixels; ``2**num_stages`` must divide it.
        channels: Image channels.
        dim: Channels of the latent maps, D.
        width: Channels in between.
        num_stages: How often the size is halved.
        num_blocks: Residual blocks after that.

    Attributes:
        latent_shape: Shape of one latent, ``(D, h, w)``.

    Raises:
        ValueError: If ``dim`` is below 1, ``image_size`` cannot be halved so often, there is no stage, or fewer than no
            block.
    """

    def __init__(
        self, image_size: int, channels: int, dim: int, width: int = 64, num_stages: int = 2, num_blocks: int = 2
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"ConvMapEncoder: dim must be at least 1, got {dim}. It is the channels of the latent.")
        self.features = ConvFeatureEncoder(image_size, channels, 2 * dim, width, num_stages, num_blocks)
        self.sample_shape = (channels, image_size, image_size)
        self.num_classes: int | None = None
        self.latent_shape = (dim, self.features.grid_size, self.features.grid_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            x: Images in ``[-1, 1]``, ``(N, C, H, W)``.

        Returns:
            Mean and logarithm of the variance of the posterior, each ``(N, D, h, w)``.

        Raises:
            ValueError: If ``x`` has another shape.
        """
        mean, logvar = self.features(x).chunk(2, dim=1)
        return mean, logvar
