"""The variance of a stochastic step down, ``p(x_next | x_t)``.

With ``beta`` the variance of the step up, ``q(x_t | x_next)``, and ``beta_tilde`` that of ``q(x_next | x_t, x0)``::

    beta = sigma**2 - (alpha / alpha_next)**2 * sigma_next**2
    beta_tilde = beta * sigma_next**2 / sigma**2

Source: Kingma et al. 2021, App. A (arXiv:2107.00630), which holds for any ``alpha`` and ``sigma``; with
``alpha**2 + sigma**2 = 1`` they are those of Ho et al. 2020, eq. 7 (arXiv:2006.11239).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.schedules import DiscreteSchedule, Level
from lit_generative.recipe import Recorded


def step_variances(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest sensible variance of a step down.

    Args:
        alpha: Factor of the image before the step; may be 0, any shape.
        sigma: Factor of the noise before the step, same shape.
        alpha_next: Factor of the image after it, above 0, same shape.
        sigma_next: Factor of the noise after it, same shape.

    Returns:
        ``log_beta`` and ``log_beta_tilde``, of that shape. Where ``sigma_next`` is 0 the second is minus infinity.
    """
    log_beta = (sigma.square() - (alpha / alpha_next * sigma_next).square()).log()
    return log_beta, log_beta + 2 * (sigma_next.log() - sigma.log())


def training_variances(schedule: DiscreteSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same for steps from ``t`` to ``t - 1``, finite everywhere: at 0, ``log_beta_tilde`` is that of 1.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), whose code does so.

    Args:
        schedule: Where the times are from.
        t: ``(N,)``.

    Returns:
        ``log_beta`` and ``log_beta_tilde``, each ``(N,)``, float32.

    Raises:
        ValueError: If the schedule has a single noise level.
    """
    if schedule.num_timesteps < 2:
        raise ValueError(
            f"{type(schedule).__name__}: the variance of a step can only be learned with 2 noise levels or more, got "
            f"num_timesteps={schedule.num_timesteps}."
        )
    cumprod = schedule.alphas_cumprod
    after = torch.cat([torch.ones_like(cumprod[:1]), cumprod[:-1]])
    log_beta, log_beta_tilde = step_variances(cumprod.sqrt(), (1 - cumprod).sqrt(), after.sqrt(), (1 - after).sqrt())
    log_beta_tilde[0] = log_beta_tilde[1]
    return log_beta.float().to(t.device)[t], log_beta_tilde.float().to(t.device)[t]


def between(raw: Tensor, log_beta: Tensor, log_beta_tilde: Tensor) -> Tensor:
    """The logarithm of a learned variance: at ``raw = 1`` that of beta, at ``raw = -1`` that of beta tilde.

    Source: Nichol & Dhariwal 2021, eq. 15 (arXiv:2102.09672).

    Args:
        raw: What the network says, ``(N, ...)``.
        log_beta: Broadcasts to ``raw``.
        log_beta_tilde: Likewise.
    """
    v = (raw + 1) / 2
    return v * log_beta + (1 - v) * log_beta_tilde


class ReverseVariance(Recorded, ABC):
    """A choice of the variance of a step down."""

    def log_variance(self, now: Level, then: Level, raw: Tensor | None = None) -> Tensor:
        """Logarithm of the variance of a step that does not end at clean data.

        Args:
            now: The level before the step.
            then: The level after it, with noise left.
            raw: What the network says of the variance, ``(N, ...)``, if it does.

        Returns:
            One number, ``()`` float64, or one for each value, the shape of ``raw``.

        Raises:
            ValueError: If the variance is learned and the network says nothing of it.
        """
        numbers = (torch.tensor(v, dtype=torch.float64) for v in (now.alpha, now.sigma, then.alpha, then.sigma))
        return self.choose(*step_variances(*numbers), raw)

    @abstractmethod
    def choose(self, log_beta: Tensor, log_beta_tilde: Tensor, raw: Tensor | None) -> Tensor:
        """The logarithm of the variance, from those of beta and beta tilde; all three broadcast.

        Raises:
            ValueError: If the variance is learned and the network says nothing of it.
        """


class PosteriorVariance(ReverseVariance):
    """Beta tilde, right if the data is one point; the smaller choice.

    Source: Ho et al. 2020, sec. 3.2 (arXiv:2006.11239).
    """

    @override
    def choose(self, log_beta: Tensor, log_beta_tilde: Tensor, raw: Tensor | None) -> Tensor:
        return log_beta_tilde


class BetaVariance(ReverseVariance):
    """Beta, right if the data is standard normal; the larger choice.

    Source: Ho et al. 2020, sec. 3.2 (arXiv:2006.11239).
    """

    @override
    def choose(self, log_beta: Tensor, log_beta_tilde: Tensor, raw: Tensor | None) -> Tensor:
        return log_beta


class LearnedVariance(ReverseVariance):
    """What the network says, between the other two: see :func:`between`.

    Source: Nichol & Dhariwal 2021, eq. 15 (arXiv:2102.09672).
    """

    @override
    def choose(self, log_beta: Tensor, log_beta_tilde: Tensor, raw: Tensor | None) -> Tensor:
        if raw is None:
            raise ValueError(
                "LearnedVariance: the network must say something of the variance, in C more channels, and this one "
                "does not. Train with an objective that learns it, or choose PosteriorVariance or BetaVariance."
            )
        return between(raw, log_beta, log_beta_tilde)
