"""What the decoder's output means: log-likelihoods of images in ``[-1, 1]``, in nats per example."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import sum_per_example


class Likelihood(Recorded, ABC):
    """Distribution of an image, given what the decoder says of it."""

    @abstractmethod
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Log-likelihood of ``x``.

        Args:
            output: The decoder's output, ``(N, C, H, W)`` (any real numbers).
            x: Images in ``[-1, 1]``, same shape.

        Returns:
            Nats per example, ``(N,)``: summed over pixels, never averaged.
        """

    @abstractmethod
    def mean(self, output: Tensor) -> Tensor:
        """Expected image in ``[-1, 1]``, ``(N, C, H, W)``."""


class Bernoulli(Likelihood):
    """Each pixel, brought to ``[0, 1]``, is the probability of a one; the decoder gives logits.

    Exact for binary images; for grey levels it is the usual cross-entropy and no likelihood of the levels.

    Source: Kingma & Welling 2014, App. C.1 (arXiv:1312.6114).
    """

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        return -sum_per_example(F.binary_cross_entropy_with_logits(output, 0.5 * (x + 1), reduction="none"))

    @override
    def mean(self, output: Tensor) -> Tensor:
        return 2 * torch.sigmoid(output) - 1


class Gaussian(Likelihood):
    """Each pixel has a normal density around the decoder's output.

    Source: Kingma & Welling 2014, App. C.2 (arXiv:1312.6114), with a fixed variance.

    Args:
        sigma: Standard deviation, in units of the ``[-1, 1]`` scale.

    Raises:
        ValueError: If ``sigma`` is not positive.
    """

    def __init__(self, sigma: float = 0.1) -> None:
        if sigma <= 0:
            raise ValueError(f"Gaussian: sigma must be positive, got {sigma}.")
        self.sigma = sigma

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        z = (x - output) / self.sigma
        return -sum_per_example(0.5 * z.square() + math.log(self.sigma) + 0.5 * math.log(2 * math.pi))

    @override
    def mean(self, output: Tensor) -> Tensor:
        return output.clamp(-1, 1)
