"""What the network predicts, and how to read image and noise from it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded


class Parameterization(Recorded, ABC):
    """Two conversions; ``alpha`` and ``sigma`` broadcast to ``x_t = alpha * x0 + sigma * eps``."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network shall give, same shape as ``x0``."""

    @abstractmethod
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Clean image that the network's output means, same shape as ``x_t``."""


class Epsilon(Parameterization):
    """The network predicts the noise.

    Source: Ho et al. 2020, eq. 12 and 15 (arXiv:2006.11239).
    """

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha


class Velocity(Parameterization):
    """The network predicts ``v = alpha * eps - sigma * x0``.

    Source: Salimans & Ho 2022, App. D (arXiv:2202.00512).
    """

    @override
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps - sigma * x0

    @override
    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x_t - sigma * output
