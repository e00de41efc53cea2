"""R3GAN's generator and discriminator: residual networks without normalization, noise or styles.

Source: Huang, Gokaslan, Kuleshov & Tompkin 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline"
(arXiv:2501.05441), configuration E. They are meant for the relativistic pairing loss with R1 and R2.

From the paper: residual blocks of a 1x1, a grouped 3x3 and a 1x1 convolution, the middle one wider (inverted
bottleneck); leaky ReLU between them and none after the last; last convolution zero and the other two scaled down by
``L**-0.25`` at the start, with ``L`` the number of blocks (Fixup: Zhang, Dauphin & Ma 2019, arXiv:1901.09321); bilinear
resampling between sizes, with a 1x1 convolution where the width changes; a learned 4x4 basis scaled by the latent at
the generator's start; a global depthwise 4x4 convolution and a linear layer at the discriminator's end.

Chosen here, where the paper's text leaves room: biases in the first two convolutions of a block and in the layers at
both ends; slope 0.2; He's initialization, with gain 1 where no activation follows; halving by the mean of 2x2 pixels,
which is what bilinear interpolation gives there; the 1x1 convolution of a transition where the map is smaller; one
class embedding as long as the latent in the generator; in the discriminator a projection of the last features (Miyato
& Koyama 2018, arXiv:1802.05637), added to the unconditional logit.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_generative.networks.checks import LOWEST_SIZE, check_label, check_shape, pyramid_widths
from lit_generative.recipe import Recorded

_SLOPE = 0.2
_EXPANSION = 2


class R3GANGenerator(Recorded, nn.Module):
    """Latents to images: a 4x4 basis, then residual blocks and bilinear upsampling in turn.

    Args:
        image_size: Height and width in pixels: 4 times a power of two, at least 8.
        channels: Image channels.
        latent_dim: Length of ``z``.
        width: Channels at ``image_size``. They double with every halving of the size.
        max_width: Most channels.
        num_blocks: Residual blocks at each size.
        group_width: Channels in a group of the 3x3 convolutions; it divides twice the channels of every size.
        num_classes: How many classes a label may name; None for an unconditional generator.

    Raises:
        ValueError: If ``image_size``, ``width``, ``num_blocks`` or ``group_width`` does not fit.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        latent_dim: int = 64,
        width: int = 96,
        max_width: int = 768,
        num_blocks: int = 2,
        group_width: int = 16,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        widths = _widths("R3GANGenerator", image_size, width, max_width, num_blocks, group_width)[::-1]
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, latent_dim)
        self.basis = nn.Parameter(torch.randn(widths[0], LOWEST_SIZE, LOWEST_SIZE))
        self.scale = nn.Linear(latent_dim if num_classes is None else 2 * latent_dim, widths[0])
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([widths[0], *widths]):
            layers += [] if not layers else [_Transition(before, after, up=True)]
            layers += _blocks(after, num_blocks, group_width, num_blocks * len(widths))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], channels, 1)
        for layer in (self.scale, self.head):
            _initialize(layer)

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
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(y).to(z.dtype)], dim=1)
        images: Tensor = self.head(self.layers(self.basis * self.scale(z)[:, :, None, None]))
        return images


class R3GANDiscriminator(Recorded, nn.Module):
    """Images to logits: residual blocks and bilinear downsampling in turn, down to 4x4.

    Args:
        image_size: Height and width in pixels: 4 times a power of two, at least 8.
        channels: Image channels.
        width: Channels at ``image_size``. They double with every halving of the size.
        max_width: Most channels.
        num_blocks: Residual blocks at each size.
        group_width: Channels in a group of the 3x3 convolutions; it divides twice the channels of every size.
        num_classes: How many classes a label may name; None for an unconditional discriminator.

    Raises:
        ValueError: If ``image_size``, ``width``, ``num_blocks`` or ``group_width`` does not fit.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        width: int = 96,
        max_width: int = 768,
        num_blocks: int = 2,
        group_width: int = 16,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        widths = _widths("R3GANDiscriminator", image_size, width, max_width, num_blocks, group_width)
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        self.from_colours = nn.Conv2d(channels, widths[0], 1)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([widths[0], *widths]):
            layers += [] if not layers else [_Transition(before, after, up=False)]
            layers += _blocks(after, num_blocks, group_width, num_blocks * len(widths))
        self.layers = nn.Sequential(*layers)
        self.pool = nn.Conv2d(widths[-1], widths[-1], LOWEST_SIZE, groups=widths[-1], bias=False)
        self.head = nn.Linear(widths[-1], 1)
        for layer in (self.from_colours, self.pool, self.head):
            _initialize(layer)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, widths[-1])
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, 0.0, 1 / math.sqrt(widths[-1]))

    def features(self, x: Tensor) -> Tensor:
        """What the logit is read from: images ``(N, C, H, W)`` to ``(N, D)``, with ``D`` the width at 4x4."""
        return self.pool(self.layers(self.from_colours(x))).flatten(start_dim=1)

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
        check_shape(self, x, self.sample_shape)
        features = self.features(x)
        logits: Tensor = self.head(features).squeeze(dim=1)
        if self.embedding is not None:
            logits = logits + (self.embedding(y) * features).sum(dim=1)
        return logits


class _Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution, added to the input; the identity at the start.

    Args:
        width: Channels of input and output; between them are twice as many.
        group_width: Channels in a group of the 3x3 convolution.
        num_blocks: Blocks in the whole network, ``L``.
    """

    def __init__(self, width: int, group_width: int, num_blocks: int) -> None:
        super().__init__()
        hidden = _EXPANSION * width
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden // group_width)
        self.conv3 = nn.Conv2d(hidden, width, 1, bias=False)
        for layer in (self.conv1, self.conv2):
            # Fixup's L**(-1 / (2 m - 2)) for branches of m = 3 layers.
            _initialize(layer, nn.init.calculate_gain("leaky_relu", _SLOPE) * num_blocks**-0.25)
        nn.init.zeros_(self.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), _SLOPE)
        h = F.leaky_relu(self.conv2(h), _SLOPE)
        return x + self.conv3(h)


class _Transition(nn.Module):
    """Double or halve the size bilinearly, and change the channels if they differ."""

    def __init__(self, in_channels: int, out_channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            _initialize(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        # The two commute; the convolution stands where the map is smaller.
        if self.up:
            return _resize(self.conv(x), 2.0)
        return self.conv(_resize(x, 0.5))


def _resize(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _blocks(width: int, num: int, group_width: int, num_in_network: int) -> list[nn.Module]:
    return [_Block(width, group_width, num_in_network) for _ in range(num)]


def _widths(name: str, image_size: int, width: int, max_width: int, num_blocks: int, group_width: int) -> list[int]:
    """Channels at the sizes ``image_size, ..., 4``."""
    if num_blocks < 1 or group_width < 1:
        raise ValueError(
            f"{name}: num_blocks and group_width must be at least 1, got num_blocks={num_blocks} and "
            f"group_width={group_width}."
        )
    widths = pyramid_widths(name, image_size, width, max_width)
    unfit = [w for w in widths if _EXPANSION * w % group_width]
    if unfit:
        raise ValueError(
            f"{name}: group_width={group_width} must divide twice the channels of every size, got {unfit[0]} channels. "
            f"Take multiples of {group_width} for width and max_width, or a smaller group_width."
        )
    return widths


def _initialize(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Weights from ``N(0, gain**2 / fan_in)``, bias zero."""
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
