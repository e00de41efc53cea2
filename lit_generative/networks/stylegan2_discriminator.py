"""StyleGAN2's discriminator: residual blocks with low-pass filtered downsampling, and minibatch standard deviation.

Source: Karras et al. 2020 (arXiv:1912.04958), sec. 4 and fig. 7. Class labels by projection (Miyato & Koyama 2018,
arXiv:1802.05637), as Karras et al. 2020 (arXiv:2006.06676) do.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from lit_generative.networks.checks import LOWEST_SIZE, check_label, check_shape, pyramid_widths
from lit_generative.networks.minibatch_std import MinibatchStd
from lit_generative.networks.stylegan2_layers import (
    EqualizedConv2d,
    EqualizedLinear,
    scaled_leaky_relu,
    unit_rms,
)
from lit_generative.recipe import Recorded

_MAX_WIDTH = 512


class StyleGAN2Discriminator(Recorded, nn.Module):
    """Images to logits; it may be differentiated twice, as R1 asks.

    The class is embedded by a table of rows of unit mean square, whose dot product with the last features is divided by
    the square root of their number and added to the logit. Chosen here: no mapping network comes after the table.

    Args:
        image_size: Height and width in pixels: 4 times a power of two, at least 8.
        channels: Image channels.
        width: Channels at ``image_size``. They double with every halving of the size, up to 512.
        num_classes: How many classes a label may name; None for an unconditional discriminator.
        group_size: Examples that minibatch standard deviation compares, see
            :class:`~lit_generative.networks.minibatch_std.MinibatchStd`; None leaves that layer out, so that a verdict
            does not depend on the rest of the batch.

    Raises:
        ValueError: If ``image_size``, ``width`` or ``group_size`` does not fit.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        width: int = 64,
        num_classes: int | None = None,
        group_size: int | None = 4,
    ) -> None:
        super().__init__()
        widths = pyramid_widths("StyleGAN2Discriminator", image_size, width, _MAX_WIDTH)
        self.num_classes = num_classes
        self.sample_shape = (channels, image_size, image_size)
        self.from_colours = EqualizedConv2d(channels, widths[0], 1)
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in itertools.pairwise(widths)))
        last = widths[-1]
        self.minibatch_std = nn.Identity() if group_size is None else MinibatchStd(group_size)
        self.conv = EqualizedConv2d(last if group_size is None else last + 1, last, 3)
        self.linear = EqualizedLinear(last * LOWEST_SIZE**2, last)
        self.head = EqualizedLinear(last, 1)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, last)

    def features(self, x: Tensor) -> Tensor:
        """What the logit is read from: images ``(N, C, H, W)`` to ``(N, D)``, with ``D`` the width at 4x4."""
        h = self.blocks(scaled_leaky_relu(self.from_colours(x)))
        h = scaled_leaky_relu(self.conv(self.minibatch_std(h)))
        return scaled_leaky_relu(self.linear(h.flatten(start_dim=1)))

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
            projection = (unit_rms(self.embedding(y)) * features).sum(dim=1)
            logits = logits + projection / math.sqrt(features.shape[1])
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions, of which the second halves the size, added to a 1x1 convolution that halves it too."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, down=True)
        self.shortcut = EqualizedConv2d(in_channels, out_channels, 1, down=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = scaled_leaky_relu(self.conv1(x))
        h = scaled_leaky_relu(self.conv2(h))
        # The sum of two would have twice the variance.
        return (h + self.shortcut(x)) / math.sqrt(2)
