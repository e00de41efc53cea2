"""Log-probabilities of 8-bit pixels: logistic densities, integrated over each of the 256 levels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lit_generative.tensor_ops import HALF_LEVEL, check_pixel_levels, sum_per_example
from lit_generative.vae.likelihoods import Likelihood, soft_floor

LOWEST_FLOOR = -20.0


class DiscretizedLogistic(Likelihood):
    """A logistic density of each value, summed up over its level; the decoder gives mean and log-scale.

    Level ``k`` of ``0..255`` is the value ``k / 127.5 - 1``, as the data modules make it, and has the probability of
    the interval of half width 1/255 around it; levels 0 and 255 take the tails too. The log-scale is bounded from below
    as ``m + softplus(log_scale - m)`` with ``m = min_log_scale``: a gradient is left, unlike with the clamp of
    PixelCNN++'s published code.

    ``mean`` is that of the density, clamped to ``[-1, 1]``: near black and white the exact one differs by the tails.

    Source: Kingma et al. 2016 (arXiv:1606.04934); the tails: Salimans et al. 2017, sec. 2.1
    (arXiv:1701.05517).

    Args:
        min_log_scale: What no log-scale falls below. At -7 a level in the middle has a probability of 0.97 at most.

    Raises:
        ValueError: If ``min_log_scale`` is not in ``[-20, 0]``.
    """

    parameters_per_value = 2
    discrete = True

    def __init__(self, min_log_scale: float = -7.0) -> None:
        _check_floor(self, min_log_scale)
        self.min_log_scale = min_log_scale

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        mean, log_scale = self.unpack(output, x)
        return sum_per_example(level_log_prob(x, mean, soft_floor(log_scale, self.min_log_scale)))

    @override
    def mean(self, output: Tensor) -> Tensor:
        mean, _ = self.unpack(output)
        return mean.clamp(-1, 1)

    @override
    def check(self, x: Tensor) -> None:
        check_levels(self, x)


class DiscretizedLogisticMixture(Likelihood):
    """A mixture of M discretized logistic densities for each value; the decoder gives weights, means and log-scales.

    The 3 * M numbers are the M logits of the weights, then the M means, then the M log-scales.

    PixelCNN++ shares the weights between the channels of a pixel and lets the mean of green depend on red, and that of
    blue on both. Here channels are independent given the latent: the mixture then has a mean, works for any number of
    channels, and what channels have in common is left to the latent, whose task it is.

    ``mean`` is that of the mixture; each component's mean is clamped to ``[-1, 1]`` first, since one far below black
    only says "black", and would drag the others there.

    Source: Salimans et al. 2017, sec. 2.1 and 2.2 (arXiv:1701.05517).

    Args:
        num_components: M.
        min_log_scale: As in :class:`DiscretizedLogistic`.

    Raises:
        ValueError: If ``num_components`` is below 1, or ``min_log_scale`` not in ``[-20, 0]``.
    """

    discrete = True

    def __init__(self, num_components: int = 10, min_log_scale: float = -7.0) -> None:
        if num_components < 1:
            raise ValueError(f"DiscretizedLogisticMixture: num_components must be at least 1, got {num_components}.")
        _check_floor(self, min_log_scale)
        self.num_components, self.min_log_scale = num_components, min_log_scale
        self.parameters_per_value = 3 * num_components

    @override
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        logits, means, log_scales = self.unpack(output, x).chunk(3)
        components = level_log_prob(x, means, soft_floor(log_scales, self.min_log_scale))
        return sum_per_example(torch.logsumexp(logits.log_softmax(dim=0) + components, dim=0))

    @override
    def mean(self, output: Tensor) -> Tensor:
        logits, means, _ = self.unpack(output).chunk(3)
        return (logits.softmax(dim=0) * means.clamp(-1, 1)).sum(dim=0).clamp(-1, 1)

    @override
    def check(self, x: Tensor) -> None:
        check_levels(self, x)


def level_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of a pixel's level under a logistic density.

    ``sigmoid(a) - sigmoid(b) = sigmoid(a) * sigmoid(-b) * (1 - exp(b - a))``, so every term has a logarithm that is
    finite in float32, in the middle of the density and far out; the tails leave out two of the three factors.

    Args:
        x: Images in ``[-1, 1]``, whose levels are the nearest ones, ``(N, C, H, W)``.
        mean: Means, broadcastable with ``x``.
        log_scale: Logarithms of the scales, same shape.

    Returns:
        Nats for each value, of the shape all broadcast to.
    """
    level = x.add(1).mul(127.5).round()
    from_mean = level / 127.5 - 1 - mean
    inverse_scale = (-log_scale).exp()
    below = F.logsigmoid((from_mean + HALF_LEVEL) * inverse_scale)  # log P(value < upper edge)
    above = F.logsigmoid((HALF_LEVEL - from_mean) * inverse_scale)  # log P(value > lower edge)
    darkest, brightest = level <= 0, level >= 255
    zero = torch.zeros_like(below)
    within = torch.where(darkest | brightest, zero, _log_one_minus_exp(math.log(2 * HALF_LEVEL) - log_scale))
    return torch.where(brightest, zero, below) + torch.where(darkest, zero, above) + within


def _log_one_minus_exp(log_w: Tensor) -> Tensor:
    """``log(1 - exp(-w))`` from ``log(w)``, also where ``w`` is too small for ``exp`` to tell it from zero."""
    small = log_w < -7.0
    w = torch.where(small, 1.0, log_w).exp()
    return torch.where(small, log_w - 0.5 * log_w.exp(), (-torch.expm1(-w)).log())


def check_levels(likelihood: Likelihood, x: Tensor) -> None:
    """Refuse images that are no 8-bit pixels brought to ``[-1, 1]``.

    Raises:
        ValueError: If a value lies outside, is NaN, or is not near one of the 256 levels.
    """
    check_pixel_levels(
        f"{type(likelihood).__name__}: images",
        x,
        "Give it pixels without noise and rescaling, or use a density, as ContinuousBernoulli or a Gaussian.",
    )


def _check_floor(likelihood: Likelihood, min_log_scale: float) -> None:
    if not LOWEST_FLOOR <= min_log_scale <= 0:
        raise ValueError(
            f"{type(likelihood).__name__}: min_log_scale must be at least {LOWEST_FLOOR:g} and at most 0, got "
            f"{min_log_scale}. The published codes use -7."
        )
