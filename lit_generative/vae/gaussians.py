"""Normal likelihoods whose variance is found: learned once, for each pixel, or computed."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.vae.likelihoods import Likelihood, check_positive, normal_log_density, soft_floor


class LearnedGaussian(Likelihood, nn.Module):
    """A normal density around the decoder's output, with one standard deviation for all pixels, learned with the rest.

    Source: the shared variance of Rybkin, Daniilidis & Levine 2021 (arXiv:2006.13202).

    Args:
        sigma: Standard deviation at the start, in units of the ``[-1, 1]`` scale.

    Attributes:
        log_sigma: Its logarithm, a scalar parameter.

    Raises:
        ValueError: If ``sigma`` is not positive.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        check_positive(self, "sigma", sigma)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        (mean,) = self.unpack(output, x)
        return normal_log_density((x - mean) / self.log_sigma.exp(), self.log_sigma)

    @override
    def mean(self, output: Tensor) -> Tensor:
        (mean,) = self.unpack(output)
        return mean.clamp(-1, 1)


class PixelwiseGaussian(Likelihood):
    """The decoder gives mean and log-variance of each value.

    A pixel that never changes would have an infinite density, hence ``min_sigma``. The log-variance ``v`` of the
    decoder is read as ``m + softplus(v - m)`` with ``m = log(min_sigma**2)``.

    Source: Kingma & Welling 2014, App. C.2 (arXiv:1312.6114); the bound from below is ours.

    Args:
        min_sigma: Standard deviation that none falls below, in units of the ``[-1, 1]`` scale.

    Raises:
        ValueError: If ``min_sigma`` is not positive.
    """

    parameters_per_value = 2

    def __init__(self, min_sigma: float = 0.01) -> None:
        check_positive(self, "min_sigma", min_sigma)
        self.min_sigma = min_sigma

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        mean, logvar = self.unpack(output, x)
        log_sigma = 0.5 * soft_floor(logvar, 2 * math.log(self.min_sigma))
        return normal_log_density((x - mean) * (-log_sigma).exp(), log_sigma)

    @override
    def mean(self, output: Tensor) -> Tensor:
        mean, _ = self.unpack(output)
        return mean.clamp(-1, 1)


class OptimalGaussian(Likelihood, nn.Module):
    """One variance for all pixels: in training, the one under which the batch is likeliest.

    This is the mean squared error over the whole batch, draws and all processes included; the gradient passes through
    it. Evaluation must not depend on the batch and uses an average over past batches instead; before
    the first, a variance of 1.

    The optimum is computed and not learned, so no parameter lags behind. ``min_sigma`` is ours: the error may be zero.

    Source: Rybkin, Daniilidis & Levine 2021 (sigma-VAE, arXiv:2006.13202).

    Args:
        decay: How much of the average a batch leaves, in ``[0, 1)``; 0.99 averages over some 100 batches. While there
            were fewer than that, all count alike: the first errors are large, and would stay for long.
        min_sigma: Standard deviation used where the root of the error is smaller.

    Attributes:
        variance: The average, a scalar buffer.
        num_batches: How many batches it has seen, a scalar buffer.

    Raises:
        ValueError: If ``decay`` is not in ``[0, 1)``, or ``min_sigma`` not positive.
    """

    variance: Tensor
    num_batches: Tensor

    def __init__(self, decay: float = 0.99, min_sigma: float = 1e-3) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"OptimalGaussian: decay must be at least 0 and below 1, got {decay}.")
        check_positive(self, "min_sigma", min_sigma)
        self.decay, self.min_sigma = decay, min_sigma
        self.register_buffer("variance", torch.tensor(1.0))
        self.register_buffer("num_batches", torch.tensor(0))

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        (mean,) = self.unpack(output, x)
        variance = self.variance
        if self.training:
            variance = _mean_square(x - mean).clamp_min(self.min_sigma**2)
            self._follow(variance.detach())
        return normal_log_density((x - mean) * variance.rsqrt(), 0.5 * variance.log())

    @override
    def mean(self, output: Tensor) -> Tensor:
        (mean,) = self.unpack(output)
        return mean.clamp(-1, 1)

    @torch.no_grad()
    def _follow(self, variance: Tensor) -> None:
        weight = (1 / (self.num_batches + 1)).clamp_min(1 - self.decay)
        self.variance.lerp_(variance.to(self.variance.dtype), weight.to(self.variance.dtype))
        self.num_batches += 1


def _mean_square(error: Tensor) -> Tensor:
    """Over all values of all processes, which each must call it; the gradient reaches every process's."""
    total = torch.stack([error.square().sum(), error.new_tensor(error.numel())])
    if dist.is_available() and dist.is_initialized():
        total = torch.distributed.nn.functional.all_reduce(total)
    return total[0] / total[1]
