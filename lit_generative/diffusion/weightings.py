"""How much an error counts at each noise level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded


class Weighting(Recorded, ABC):
    """A factor on squared errors of the image, whatever the network predicts."""

    @abstractmethod
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Factor on the squared error of ``x0``, the shape of ``alpha``; written with ``snr = (alpha / sigma)**2``."""

    def noise_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The same factor on the squared error of ``eps``: ``image_weight / snr``, its limit where ``alpha`` is 0."""
        return self.image_weight(alpha, sigma) * (sigma / alpha).square()

    def weight(self, alpha: Tensor, sigma: Tensor, output_scale: Tensor) -> Tensor:
        """Factor on the squared error of the network's output, ``(N,)``.

        Where ``alpha`` is 0, at a zero terminal SNR, the noise says nothing of the image: then the weight of a network
        that predicts the noise is infinite, unless that of the image falls as fast as the SNR.

        Args:
            alpha: Factor of the image, ``(N,)``.
            sigma: Factor of the noise, above 0, ``(N,)``.
            output_scale: How much larger an error is in the image, ``(N,)``: see ``Parameterization.output_scale``.
        """
        weight = self.image_weight(alpha, sigma) * output_scale.square()
        return torch.where(output_scale.isinf(), self.noise_weight(alpha, sigma), weight)


class Uniform(Weighting):
    """Every error of the network's own output counts the same: L_simple.

    Source: Ho et al. 2020, eq. 14 (arXiv:2006.11239).
    """

    @override
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError("Uniform depends on what the network predicts: ask weight().")

    @override
    def weight(self, alpha: Tensor, sigma: Tensor, output_scale: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class SNR(Weighting):
    """``snr`` on the image's error, which is 1 on the noise's: L_simple, whatever the network predicts.

    Source: Ho et al. 2020, eq. 14 (arXiv:2006.11239), read as in Salimans & Ho 2022, sec. 4 (arXiv:2202.00512).
    """

    @override
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _snr(alpha, sigma)

    @override
    def noise_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


class TruncatedSNR(Weighting):
    """``max(snr, 1)`` on the image's error.

    Source: Salimans & Ho 2022, sec. 4 (arXiv:2202.00512).
    """

    @override
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _snr(alpha, sigma).clamp(min=1)


class MinSNR(Weighting):
    """``min(snr, gamma)`` on the image's error: low noise, where images are nearly there, counts less.

    On the network's own error that is ``min(snr, gamma) / snr`` for the noise and ``min(snr, gamma) / (snr + 1)`` for
    the velocity.

    Source: Hang et al. 2023, sec. 3.4 (arXiv:2303.09556).

    Args:
        gamma: Bound of the weight.

    Raises:
        ValueError: If ``gamma`` is not positive.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"MinSNR: gamma must be positive, got {gamma}.")
        self.gamma = gamma

    @override
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _snr(alpha, sigma).clamp(max=self.gamma)

    @override
    def noise_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.gamma * (sigma / alpha).square()).clamp(max=1)


class P2(Weighting):
    """``1 / (k + snr)**gamma`` on the noise's error: high noise, where content is decided, counts more.

    Source: Choi et al. 2022, sec. 3 (arXiv:2204.00227).

    Args:
        gamma: How strongly; 0 gives :class:`SNR`.
        k: Keeps the weight from exploding at high noise.

    Raises:
        ValueError: If ``gamma`` is negative, ``k`` not positive, or one infinite.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if not (0 <= gamma < math.inf and 0 < k < math.inf):
            raise ValueError(f"P2: gamma must be at least 0, k above 0, and both finite, got {gamma} and {k}.")
        self.gamma, self.k = gamma, k

    @override
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return _snr(alpha, sigma) * self.noise_weight(alpha, sigma)

    @override
    def noise_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.k + _snr(alpha, sigma)) ** -self.gamma


class EDMWeighting(Weighting):
    """``1 / sigma_data**2 + snr`` on the image's error: 1 on that of a network between identity and noise (EDM's F).

    It is the paper's ``(s**2 + sigma_data**2) / (s * sigma_data)**2`` at noise ``s = sigma / alpha``.

    Source: Karras et al. 2022, table 1, "loss weighting" (arXiv:2206.00364).

    Args:
        sigma_data: Standard deviation of the data.

    Raises:
        ValueError: If ``sigma_data`` is not positive and finite.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"EDMWeighting: sigma_data must be positive and finite, got {sigma_data}.")
        self.sigma_data = sigma_data

    @override
    def image_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.sigma_data**-2 + _snr(alpha, sigma)


def _snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha / sigma).square()
