"""From noise to data: each sampler walks down a sequence of times."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.denoiser import Denoiser
from lit_generative.recipe import Recorded

Noise = Callable[[], Tensor]
"""Draws standard normal noise of the batch's shape."""


class Sampler(Recorded, ABC):
    """A walk from ``t = num_timesteps - 1`` to data in ``num_steps`` evenly spaced steps.

    Args:
        num_steps: How often the network is called.

    Raises:
        ValueError: If ``num_steps`` is below 1.
    """

    def __init__(self, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"{type(self).__name__}: num_steps must be at least 1, got {num_steps}.")
        self.num_steps = num_steps

    def times(self, num_timesteps: int) -> list[int]:
        """The times visited, falling, and -1 (clean data) at the end: ``num_steps + 1`` of them.

        Raises:
            ValueError: If there are fewer noise levels than steps.
        """
        if self.num_steps > num_timesteps:
            raise ValueError(
                f"{type(self).__name__}: num_steps={self.num_steps} is more than the schedule's {num_timesteps} noise "
                "levels. Lower num_steps."
            )
        return [*torch.linspace(num_timesteps - 1, 0, self.num_steps, dtype=torch.float64).round().long().tolist(), -1]

    def trajectory(self, denoise: Denoiser, x_t: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk from pure noise to data.

        Args:
            denoise: Guesses image and noise.
            x_t: Standard normal noise, ``(N, ...)``.
            noise: Draws the noise that stochastic steps add.

        Yields:
            The batch after each step and the guess of the image it was made from; the last batch is the sample.
        """
        times = self.times(denoise.schedule.num_timesteps)
        for t, t_next in itertools.pairwise(times):
            x0, eps = denoise(x_t, t)
            current, following = (denoise.schedule.exact_alpha_sigma(time) for time in (t, t_next))
            x_t = self.step(x0, eps, current, following, noise)
            yield x_t, x0

    @abstractmethod
    def step(
        self, x0: Tensor, eps: Tensor, current: tuple[float, float], following: tuple[float, float], noise: Noise
    ) -> Tensor:
        """One step down.

        Args:
            x0: Guess of the image, ``(N, ...)``.
            eps: Guess of the noise, same shape.
            current: ``(alpha, sigma)`` of the time the guesses were made at.
            following: ``(alpha, sigma)`` of the next time; sigma is 0 at the end.
            noise: Draws noise of the same shape.

        Returns:
            The batch at the next time.
        """


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models: deterministic at ``eta=0``, ancestral at ``eta=1``.

    Source: Song et al. 2021, eq. 12 and 16 (arXiv:2010.02502).

    Args:
        num_steps: How often the network is called.
        eta: Share of the noise that is drawn anew.

    Raises:
        ValueError: If ``eta`` lies outside ``[0, 1]``.
    """

    def __init__(self, num_steps: int = 50, eta: float = 0.0) -> None:
        super().__init__(num_steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIMSampler: eta must lie in [0, 1], got {eta}.")
        self.eta = eta

    @override
    def step(
        self, x0: Tensor, eps: Tensor, current: tuple[float, float], following: tuple[float, float], noise: Noise
    ) -> Tensor:
        (alpha, sigma), (alpha_next, sigma_next) = current, following
        fresh = self.eta * (sigma_next / sigma) * max(0.0, 1 - (alpha / alpha_next) ** 2) ** 0.5
        kept = max(0.0, sigma_next**2 - fresh**2) ** 0.5
        x_next = alpha_next * x0 + kept * eps
        return x_next + fresh * noise() if fresh > 0 else x_next


class DDPMSampler(Sampler):
    """Ancestral sampling with the posterior's variance ("beta tilde"), strided over any number of steps.

    Source: Ho et al. 2020, eq. 7 and algorithm 2 (arXiv:2006.11239); strides as in Nichol & Dhariwal 2021, eq. 19
    (arXiv:2102.09672).

    Args:
        num_steps: How often the network is called.
    """

    def __init__(self, num_steps: int = 1000) -> None:
        super().__init__(num_steps)

    @override
    def step(
        self, x0: Tensor, eps: Tensor, current: tuple[float, float], following: tuple[float, float], noise: Noise
    ) -> Tensor:
        (alpha, sigma), (alpha_next, sigma_next) = current, following
        ratio = alpha / alpha_next  # sqrt of the product of (1 - beta) over the steps jumped
        beta = 1 - ratio**2
        x_t = alpha * x0 + sigma * eps
        mean = alpha_next * beta / sigma**2 * x0 + ratio * sigma_next**2 / sigma**2 * x_t
        if sigma_next == 0:
            return mean
        return mean + sigma_next / sigma * beta**0.5 * noise()
