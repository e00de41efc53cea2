"""The variational bound on the negative log-likelihood, term by term: nats per example.

    L = KL(q(x_T|x0) || p(x_T)) + sum over t >= 1 of KL(q(x_{t-1}|x_t, x0) || p(x_{t-1}|x_t)) - log p(x0|x_0')

where ``x_0'`` is the least noisy latent, that at t = 0. Source: Ho et al. 2020, eq. 5 (arXiv:2006.11239).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.diffusion.schedules import DiscreteSchedule, Level, NoiseSchedule
from lit_generative.diffusion.spacings import Linspace, Spacing
from lit_generative.diffusion.variances import ReverseVariance, step_variances, training_variances
from lit_generative.recipe import Recorded
from lit_generative.tensor_ops import (
    HALF_LEVEL,
    Generators,
    check_pixel_levels,
    evaluating,
    expand_like,
    log_ndtr,
    randn,
    sum_per_example,
)


class Decoder(Recorded, ABC):
    """Distribution of the data at the end of the walk: a Gaussian, and what it means for data as it is stored."""

    @abstractmethod
    def log_prob(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Log-probability, or log-density, of the data.

        Args:
            x0: Clean data, ``(N, ...)``.
            mean: Mean of the Gaussian, same shape.
            log_variance: Logarithm of its variance, broadcasts to ``x0``.

        Returns:
            Nats per example, ``(N,)``.
        """

    def check(self, x0: Tensor) -> None:
        """Refuse data that cannot be scored. Reads numbers off the device: for a first batch, not for each.

        Raises:
            ValueError: If a value is none that the distribution knows.
        """


class DiscretizedGaussian(Decoder):
    """Probability of 8-bit pixels: of the interval around a level, and for levels 0 and 255 of the tail too.

    Source: Ho et al. 2020, eq. 13 (arXiv:2006.11239).
    """

    @override
    def log_prob(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        level = x0.add(1).mul(127.5).round()
        from_mean = level / 127.5 - 1 - mean
        inverse_std = (-0.5 * log_variance).exp()
        upper, lower = (from_mean + HALF_LEVEL) * inverse_std, (from_mean - HALF_LEVEL) * inverse_std
        # An interval above the mean is as probable as its mirror image, whose distribution function has digits left.
        darkest, brightest = level <= 0, level >= 255
        mirrored = brightest | ((from_mean > 0) & ~darkest)
        near, far = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
        log_near = log_ndtr(near)
        ratio = torch.where(darkest | brightest, -math.inf, log_ndtr(far) - log_near)  # 0 with the tail
        return sum_per_example(log_near + (-torch.expm1(ratio)).log())

    @override
    def check(self, x0: Tensor) -> None:
        check_pixel_levels(
            "DiscretizedGaussian: data", x0, "For points and latents take the decoder ContinuousGaussian."
        )


class ContinuousGaussian(Decoder):
    """Density of points, latents, or pixels without levels."""

    @override
    def log_prob(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        squares = (x0 - mean).square() * (-log_variance).exp()
        return -0.5 * sum_per_example(squares + log_variance + math.log(2 * math.pi))


def vlb_term(
    x0: Tensor, x0_hat: Tensor, t: Tensor, log_variance: Tensor, schedule: DiscreteSchedule, decoder: Decoder
) -> Tensor:
    """The term of the bound that belongs to the step from ``t`` to ``t - 1``.

    Args:
        x0: Clean data, ``(N, ...)``.
        x0_hat: The guess of it from ``x_t``, same shape.
        t: Times in ``[0, num_timesteps)``, ``(N,)``.
        log_variance: Logarithm of the variance of ``p(x_{t-1}|x_t)``, broadcasts to ``x0``.
        schedule: Where ``t`` is from, of 2 levels or more.
        decoder: ``p(x0|x_t)`` at ``t = 0``.

    Returns:
        Nats per example, ``(N,)``: a KL divergence at ``t >= 1``, a negative log-likelihood at 0.
    """
    log_beta, log_beta_tilde = training_variances(schedule, t)
    alpha_next, _ = schedule.alpha_sigma(t - 1)
    _, sigma = schedule.alpha_sigma(t)
    image_factor = alpha_next * log_beta.exp() / sigma.square()
    kl = _step_kl(x0 - x0_hat, log_variance, *(expand_like(v.to(x0.dtype), x0) for v in (image_factor, log_beta_tilde)))
    return torch.where(t == 0, -decoder.log_prob(x0, x0_hat, log_variance), kl)


def prior_term(x0: Tensor, schedule: NoiseSchedule, first: Level | None = None) -> Tensor:
    """``KL(q(x_T|x0) || N(0, initial_scale**2 I))``, what the noisiest time still knows of the data.

    Args:
        x0: Clean data, ``(N, ...)``.
        schedule: Noise levels.
        first: Where the walk begins; None for the noisiest.

    Returns:
        Nats per example, ``(N,)``.
    """
    _, alpha, sigma = schedule.level(schedule.even_times(1)[0]) if first is None else first
    scale = schedule.initial_scale
    variance = (sigma / scale) ** 2
    return 0.5 * sum_per_example((alpha / scale * x0).square() + (variance - 1 - math.log(variance)))


@torch.no_grad()
def evaluate_bound(
    denoise: Denoiser,
    x0: Tensor,
    variance: ReverseVariance,
    decoder: Decoder | None = None,
    num_steps: int | None = None,
    generator: Generators = None,
    spacing: Spacing | None = None,
) -> Tensor:
    """All terms of the bound, each estimated from one draw of ``x_t``; their sum over the first axis is the bound.

    With fewer steps it is the bound of a sampler that takes so many: Nichol & Dhariwal 2021, eq. 19
    (arXiv:2102.09672). Divide by ``x0[0].numel() * log(2)`` for bits per dimension.

    Args:
        denoise: Guesses the image, given labels if there are any; the network is asked in evaluation mode.
        x0: Clean data, ``(N, ...)``.
        variance: Of the steps down, as the sampler has it; at the last one beta tilde is that of the step before.
        decoder: ``p(x0|x_t)`` at the last step; None for :class:`DiscretizedGaussian`, of 8-bit pixels.
        num_steps: K; None for every time of a discrete schedule.
        generator: Source of the noise; with one for each example, that example's figures do not depend on the others.
        spacing: Which times; None for evenly spaced ones.

    Returns:
        Nats, ``(K + 1, N)``: the decoder's term, those of the steps from the least noisy to the noisiest, the prior's.

    Raises:
        ValueError: If the decoder refuses the data, the schedule has fewer levels, or the denoiser remembers its last
            guess: then the steps are no Markov chain.
    """
    decoder = DiscretizedGaussian() if decoder is None else decoder
    decoder.check(x0)
    if denoise.self_conditioning:
        raise ValueError(
            "evaluate_bound: with self_conditioning a step depends on the guesses before it, and the bound does not "
            "hold. Evaluate a model trained without."
        )
    terms, levels = [], _falling(denoise.schedule, num_steps, Linspace() if spacing is None else spacing)
    known: Tensor | None = None  # beta tilde of the step before
    with evaluating(denoise.network):
        for now, then in itertools.pairwise(levels):
            eps = randn(x0.shape, generator, x0.device).to(x0.dtype)
            guess = denoise(now.alpha * x0 + now.sigma * eps, now)
            log_beta, log_beta_tilde = _log_variances(now, then)
            if then.sigma > 0:
                known = log_beta_tilde
            log_variance = variance.choose(log_beta, log_beta if known is None else known, guess.variance).to(x0)
            if then.sigma > 0:
                image_factor = then.alpha * log_beta.exp() / now.sigma**2
                terms.append(_step_kl(x0 - guess.x0, log_variance, image_factor, log_beta_tilde))
            else:
                terms.append(-decoder.log_prob(x0, guess.x0, log_variance))
    return torch.stack([*reversed(terms), prior_term(x0, denoise.schedule, levels[0])])


def _step_kl(error: Tensor, log_variance: Tensor, image_factor: Tensor, log_beta_tilde: Tensor) -> Tensor:
    """KL divergence of ``q(x_next|x_t, x0)`` from a Gaussian whose mean differs by a guess of ``x0``, ``(N,)``.

    Args:
        error: Of that guess, ``(N, ...)``.
        log_variance: Logarithm of the variance of that Gaussian.
        image_factor: How much of ``x0`` is in the mean of q.
        log_beta_tilde: Logarithm of the variance of q.
    """
    log_ratio = log_beta_tilde - log_variance
    squares = (image_factor * error).square() * (-log_variance).exp()
    return 0.5 * sum_per_example(torch.expm1(log_ratio) - log_ratio + squares)


def _log_variances(now: Level, then: Level) -> tuple[Tensor, Tensor]:
    """Logarithms of beta and beta tilde, each ``()`` float64."""
    values = (torch.tensor(v, dtype=torch.float64) for v in (now.alpha, now.sigma, then.alpha, then.sigma))
    return step_variances(*values)


def _falling(schedule: NoiseSchedule, num_steps: int | None, spacing: Spacing) -> list[Level]:
    """``num_steps`` levels, falling, then clean data."""
    if num_steps is None:
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(f"evaluate_bound: {type(schedule).__name__} has no steps of its own. Give num_steps.")
        num_steps = schedule.num_timesteps
    try:
        times = spacing.times(schedule, num_steps)
    except ValueError as error:
        raise ValueError(f"evaluate_bound: {error}") from None
    return [schedule.level(t) for t in [*times, schedule.clean]]
