"""Random numbers of an augmentation: each image's own, and neutral where an operation leaves the image alone."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Draws for a batch, on its device and of its dtype, so that nothing waits for them.

    Args:
        x: The batch, ``(N, ...)``.
        p: Probability that an operation acts on an image, a scalar.
    """

    def __init__(self, x: Tensor, p: Tensor) -> None:
        self.x = x
        self.p = p

    def uniform(self, low: float, high: float) -> Tensor:
        """``(N,)`` from ``[low, high)``."""
        return low + (high - low) * torch.rand(len(self.x), device=self.x.device, dtype=self.x.dtype)

    def normal(self, std: float) -> Tensor:
        """``(N,)`` from ``N(0, std**2)``."""
        return std * torch.randn(len(self.x), device=self.x.device, dtype=self.x.dtype)

    def power_of_two(self, std: float) -> Tensor:
        """``(N,)`` factors ``2**n`` with ``n`` from ``N(0, std**2)``: log-normal, with ``std * ln 2`` in the log."""
        return self.normal(std).exp2()

    def integers(self, num: int) -> Tensor:
        """``(N,)`` whole numbers from ``[0, num)``, of the batch's dtype."""
        return torch.randint(num, (len(self.x),), device=self.x.device).to(self.x.dtype)

    def acts(self, p: Tensor | None = None) -> Tensor:
        """``(N,)`` booleans: whether an operation acts, with probability ``p``, or that of the batch."""
        return torch.rand(len(self.x), device=self.x.device) < (self.p if p is None else p)
