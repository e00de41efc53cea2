"""From noise to data: each sampler walks down a sequence of times."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser, Guess
from lit_generative.diffusion.guidance import Guidance
from lit_generative.diffusion.schedules import Level, NoiseSchedule
from lit_generative.diffusion.spacings import Linspace, Spacing
from lit_generative.diffusion.variances import LearnedVariance, PosteriorVariance, ReverseVariance
from lit_generative.recipe import Recorded

Noise = Callable[[], Tensor]
"""Draws standard normal noise of the batch's shape."""


class Sampler(Recorded, ABC):
    """A walk from the noisiest time of the schedule to data.

    Args:
        num_steps: How many steps.
        spacing: Which times are visited; None for :class:`~lit_generative.diffusion.spacings.Linspace`.
        guidance: How predictions are combined; None takes the network's one prediction.

    Attributes:
        single_step: Whether a step needs no more than the guess at its level; without, there is only the whole walk.

    Raises:
        ValueError: If ``num_steps`` is below 1.
    """

    single_step: bool = True

    def __init__(self, num_steps: int, spacing: Spacing | None = None, guidance: Guidance | None = None) -> None:
        if num_steps < 1:
            raise ValueError(f"{type(self).__name__}: num_steps must be at least 1, got {num_steps}.")
        self.num_steps = num_steps
        self.spacing = Linspace() if spacing is None else spacing
        self.guidance = guidance

    def levels(self, schedule: NoiseSchedule) -> list[Level]:
        """The noise levels visited, falling, clean data at the end: ``num_steps + 1`` of them.

        Raises:
            ValueError: If the schedule has fewer, or cannot be walked down by this sampler.
        """
        try:
            times = self.spacing.times(schedule, self.num_steps)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        return [schedule.level(t) for t in [*times, schedule.clean]]

    def trajectory(self, denoise: Denoiser, x_t: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk from pure noise to data.

        Args:
            denoise: Guesses image and noise.
            x_t: Noise of the schedule's initial scale, ``(N, ...)``.
            noise: Draws the noise that stochastic steps add.

        Yields:
            The batch after each step and the guess of the image it was made from; the last batch is the sample.
        """
        levels = self.levels(denoise.schedule)
        x_t = at_first_level(x_t, denoise.schedule, levels[0])
        for now, then in itertools.pairwise(levels):
            guess = denoise(x_t, now)
            x_t = self.step(guess, now, then, noise)
            yield x_t, guess.x0

    @abstractmethod
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        """One step down.

        Args:
            guess: Of image and noise, each ``(N, ...)``.
            now: The level the guess was made at.
            then: The next one; sigma is 0 at the end.
            noise: Draws noise of the same shape.

        Returns:
            The batch at the next level.

        Raises:
            TypeError: If the sampler is not ``single_step``.
        """


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models: deterministic at ``eta=0``, ancestral at ``eta=1``.

    Source: Song et al. 2021, eq. 12 and 16 (arXiv:2010.02502), where ``alpha**2 + sigma**2 = 1``; here for any two.

    Args:
        num_steps: How often the network is called.
        eta: Share of the noise that is drawn anew.
        spacing: As in :class:`Sampler`.
        guidance: Likewise.

    Raises:
        ValueError: If ``eta`` lies outside ``[0, 1]``.
    """

    def __init__(
        self,
        num_steps: int = 50,
        eta: float = 0.0,
        spacing: Spacing | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__(num_steps, spacing, guidance)
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIMSampler: eta must lie in [0, 1], got {eta}.")
        self.eta = eta

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        fresh = self.eta * then.sigma / now.sigma * step_up_variance(now, then) ** 0.5
        kept = max(0.0, then.sigma**2 - fresh**2) ** 0.5
        x_next = then.alpha * guess.x0 + kept * guess.eps
        return x_next + fresh * noise() if fresh > 0 else x_next


class DDPMSampler(Sampler):
    """Ancestral sampling, strided over any number of steps.

    Source: Ho et al. 2020, eq. 7 and algorithm 2 (arXiv:2006.11239); strides as in Nichol & Dhariwal 2021, eq. 19
    (arXiv:2102.09672); for any alpha and sigma as in Kingma et al. 2021, App. A (arXiv:2107.00630).

    Args:
        num_steps: How often the network is called.
        variance: Of a step; None takes the learned one if there is one, else the posterior's ("beta tilde").
        spacing: As in :class:`Sampler`.
        guidance: Likewise.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        variance: ReverseVariance | None = None,
        spacing: Spacing | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__(num_steps, spacing, guidance)
        self.variance = variance

    @override
    def step(self, guess: Guess, now: Level, then: Level, noise: Noise) -> Tensor:
        (_, alpha, sigma), (_, alpha_next, sigma_next) = now, then
        x_t = alpha * guess.x0 + sigma * guess.eps
        on_x0 = alpha_next * step_up_variance(now, then) / sigma**2
        on_x_t = alpha / alpha_next * sigma_next**2 / sigma**2
        mean = on_x0 * guess.x0 + on_x_t * x_t
        if sigma_next == 0:
            return mean
        variance = self.variance or (PosteriorVariance() if guess.variance is None else LearnedVariance())
        return mean + (0.5 * variance.log_variance(now, then, guess.variance)).exp() * noise()


def no_single_step(sampler: Sampler) -> TypeError:
    """What :meth:`Sampler.step` raises if the sampler has only whole walks."""
    return TypeError(
        f"{type(sampler).__name__}: a step needs more than the guess at one level. Walk with trajectory(), or take "
        "DDIMSampler."
    )


def step_up_variance(now: Level, then: Level) -> float:
    """Variance of ``q(x_t | x_next)``, as in :mod:`~lit_generative.diffusion.variances`; at least 0."""
    return max(0.0, now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2)


def at_first_level(x_t: Tensor, schedule: NoiseSchedule, first: Level) -> Tensor:
    """Scale noise for a walk that starts below the noisiest level, as if data had unit variance.

    Under a schedule that preserves the variance this changes nothing.

    Args:
        x_t: Noise of the schedule's initial scale, ``(N, ...)``.
        schedule: Where it is walked down.
        first: The first level.
    """
    noisiest = schedule.level(schedule.even_times(1)[0])
    return x_t * (math.hypot(first.alpha, first.sigma) / math.hypot(noisiest.alpha, noisiest.sigma))
