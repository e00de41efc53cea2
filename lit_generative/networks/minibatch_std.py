"""Standard deviation within a batch, shown to the discriminator: samples that are all alike give themselves away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_generative.tensor_ops import to_float32

_EPSILON = 1e-8


class MinibatchStd(nn.Module):
    """Append maps that hold the standard deviation over a group of examples.

    The batch is cut into groups of neighbours. Over each group the deviation of every value is taken, and its mean over
    positions and channels becomes one constant map of each example of the group; with ``num_features`` of F the
    channels are cut into F parts with a map each.

    A group has ``group_size`` examples, or if that does not divide the batch, the largest smaller number that does. A
    prime batch above ``group_size`` therefore has groups of 1, whose deviation is zero: choose a batch size that
    ``group_size`` divides.

    Source: Karras et al. 2018 (arXiv:1710.10196), sec. 3; groups: Karras et al. 2020 (arXiv:1912.04958).

    Args:
        group_size: Examples in a group, at most.
        num_features: How many maps to append; it divides the channels.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, group_size: int = 4, num_features: int = 1) -> None:
        super().__init__()
        for name, value in (("group_size", group_size), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"MinibatchStd: {name} must be at least 1, got {value}.")
        self.group_size = group_size
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Append the maps.

        Args:
            x: Feature maps, ``(N, C, H, W)``.

        Returns:
            ``(N, C + num_features, H, W)``.

        Raises:
            ValueError: If ``num_features`` does not divide ``C``.
        """
        num, channels, height, width = x.shape
        if channels % self.num_features:
            raise ValueError(
                f"MinibatchStd: num_features={self.num_features} must divide the channels, got {channels} of them."
            )
        group = next(size for size in range(min(self.group_size, max(num, 1)), 0, -1) if num % size == 0)
        parts = channels // self.num_features
        # The square of a half-precision deviation overflows soon.
        values = to_float32(x).reshape(num // group, group, self.num_features, parts, height, width)
        # Added before the root: its derivative at zero is infinite, and two equal images would have it.
        std = ((values - values.mean(dim=1, keepdim=True)).square().mean(dim=1) + _EPSILON).sqrt()
        maps = std.mean(dim=(2, 3, 4)).repeat_interleave(group, dim=0).to(x.dtype)
        return torch.cat([x, maps[:, :, None, None].expand(-1, -1, height, width)], dim=1)
