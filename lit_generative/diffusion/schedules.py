"""Noise schedules: how much of the image and of the noise ``x_t = alpha * x0 + sigma * eps`` holds at time t."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.recipe import Recorded

Time = int | float
"""A step of a discrete schedule, or a time in ``[0, 1]`` of a continuous one; noisier as it grows."""


class Level(NamedTuple):
    """One time of a schedule, in double precision: a sampler divides differences of neighbouring ones."""

    t: Time
    alpha: float
    """Factor of the image."""
    sigma: float
    """Factor of the noise; 0 if the data is clean."""


class NoiseSchedule(Recorded, nn.Module, ABC):
    """Factors of image and noise at each time.

    Attributes:
        clean: The time of clean data, where a sampler ends.
        initial_scale: Standard deviation of the noise that a sampler starts from.
    """

    clean: Time
    initial_scale: float = 1.0

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise.

        Args:
            t: Times, any shape.

        Returns:
            ``alpha`` and ``sigma``, float32, of the shape of ``t``.

        Raises:
            ValueError: If a time is not the schedule's (on an accelerator the check would wait, and is left out).
        """

    @abstractmethod
    def level(self, t: Time) -> Level:
        """The same for one time, in double precision.

        Raises:
            ValueError: If the time lies outside the schedule.
        """

    @abstractmethod
    def random_times(self, num: int, device: torch.device | str) -> Tensor:
        """Uniformly drawn times to train at, ``(num,)``, as the network gets them."""

    @abstractmethod
    def spread(self, u: Tensor) -> Tensor:
        """Bring numbers in ``[0, 1)``, ``(N,)``, to times to train at, in order."""

    @abstractmethod
    def even_times(self, num: int) -> list[Time]:
        """``num`` times from the noisiest to the least noisy, evenly spaced; the clean one is not among them.

        Raises:
            ValueError: If the schedule has fewer times.
        """

    @abstractmethod
    def nearest_times(self, ratios: Tensor) -> Tensor:
        """Those whose ``sigma / alpha`` is nearest in the logarithm, to ``(N,)`` float64: int64 or float64."""

    def nearest_time(self, ratio: float) -> Time:
        """The same for one ratio."""
        return self.nearest_times(torch.tensor([ratio], dtype=torch.float64)).item()

    def as_tensor(self, t: Time, num: int, device: torch.device | str) -> Tensor:
        """``num`` times ``t``, in the type that networks get."""
        return torch.full((num,), t, device=device, dtype=torch.int64 if isinstance(t, int) else torch.float32)


class DiscreteSchedule(NoiseSchedule):
    """Variance preserving, with numbered steps: ``alpha**2 = alphas_cumprod``, ``sigma**2 = 1 - alphas_cumprod``.

    Source: Ho et al. 2020, eq. 4 (arXiv:2006.11239).

    Args:
        betas: Variance added at each step, ``(num_timesteps,)`` float64, each in ``(0, 1)``.
        zero_terminal_snr: Shift and stretch ``sqrt(alphas_cumprod)`` so that its first value stays and its last one is
            0: training then sees the pure noise that samplers start from. The last beta is then 1. Source: Lin et al.
            2024, algorithm 1 (arXiv:2305.08891).

    Raises:
        ValueError: If a beta lies outside ``(0, 1)``; with ``zero_terminal_snr`` and fewer than 2 noise levels.
    """

    alphas: Tensor
    sigmas: Tensor
    clean: Time = -1

    def __init__(self, betas: Tensor, zero_terminal_snr: bool = False) -> None:
        super().__init__()
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"{type(self).__name__}: betas must lie in (0, 1), got {betas.min():g} to {betas.max():g}."
            )
        self.betas = self._without_last_signal(betas) if zero_terminal_snr else betas
        self.alphas_cumprod = (1 - self.betas).cumprod(0)  # float64 on the CPU, for exact steps of a sampler
        # Not in the state_dict: the constructor's arguments say it all. The last entry is that of clean data.
        exact = torch.cat([self.alphas_cumprod, torch.ones(1, dtype=torch.float64)])
        self.register_buffer("alphas", exact.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1 - exact).sqrt().float(), persistent=False)

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels; t lies in ``[0, num_timesteps)``, noisier with t; -1 means clean data."""
        return len(self.alphas_cumprod)

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device.type == "cpu" and t.numel():
            self._check(t.min().item())
            self._check(t.max().item())
        return self.alphas[t], self.sigmas[t]

    @override
    def level(self, t: Time) -> Level:
        self._check(t)
        alphas_cumprod = 1.0 if t == self.clean else float(self.alphas_cumprod[int(t)])
        return Level(t, alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5)

    @override
    def random_times(self, num: int, device: torch.device | str) -> Tensor:
        return torch.randint(self.num_timesteps, (num,), device=device)

    @override
    def spread(self, u: Tensor) -> Tensor:
        return (u * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    @override
    def even_times(self, num: int) -> list[Time]:
        if num > self.num_timesteps:
            raise ValueError(
                f"num_steps={num} is more than the schedule's {self.num_timesteps} noise levels. Lower num_steps."
            )
        return list(torch.linspace(self.num_timesteps - 1, 0, num, dtype=torch.float64).round().long().tolist())

    @override
    def nearest_times(self, ratios: Tensor) -> Tensor:
        own = 0.5 * ((1 - self.alphas_cumprod) / self.alphas_cumprod).log()
        nearest = (own - ratios.log()[:, None]).abs().argmin(dim=1)
        # To an infinite ratio no finite one is nearer than another.
        return torch.where(ratios.isinf(), self.num_timesteps - 1, nearest)

    def _without_last_signal(self, betas: Tensor) -> Tensor:
        if len(betas) < 2:
            needed = "zero_terminal_snr keeps the first level and moves the last, so num_timesteps must be at least 2"
            raise ValueError(f"{type(self).__name__}: {needed}, got {len(betas)}.")
        roots = (1 - betas).cumprod(0).sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        return _betas_along(torch.cat([torch.ones(1, dtype=torch.float64), roots.square()]))

    def _check(self, t: Time) -> None:
        if not isinstance(t, int) or t not in range(-1, self.num_timesteps):
            raise ValueError(
                f"{type(self).__name__}: times must be integers in [0, {self.num_timesteps}), or -1 for clean "
                f"data, got {t}."
            )


class LinearSchedule(DiscreteSchedule):
    """Betas on a straight line.

    Source: Ho et al. 2020, sec. 4 (arXiv:2006.11239).

    Args:
        num_timesteps: Number of noise levels.
        beta_start: First beta.
        beta_end: Last beta.
        zero_terminal_snr: As in :class:`DiscreteSchedule`.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_length(self, num_timesteps)
        super().__init__(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64), zero_terminal_snr)


class ScaledLinearSchedule(DiscreteSchedule):
    """Square roots of the betas on a straight line: Stable Diffusion's.

    Source: Rombach et al. 2022 (arXiv:2112.10752), whose code calls it "linear".

    Args:
        num_timesteps: Number of noise levels.
        beta_start: First beta.
        beta_end: Last beta.
        zero_terminal_snr: As in :class:`DiscreteSchedule`; without it ``alpha`` ends at 0.068.

    Raises:
        ValueError: If a beta is negative, or as :class:`DiscreteSchedule`.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_length(self, num_timesteps)
        if min(beta_start, beta_end) < 0:
            raise ValueError(f"ScaledLinearSchedule: betas must lie in (0, 1), got {beta_start:g} to {beta_end:g}.")
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
        super().__init__(roots.square(), zero_terminal_snr)


class CosineSchedule(DiscreteSchedule):
    """``alphas_cumprod`` along a squared cosine, betas at most 0.999.

    Source: Nichol & Dhariwal 2021, eq. 17 (arXiv:2102.09672).

    Args:
        num_timesteps: Number of noise levels.
        offset: The paper's s, which keeps the first betas from being too small.
        zero_terminal_snr: As in :class:`DiscreteSchedule`.

    Raises:
        ValueError: If ``offset`` is negative or infinite, or as :class:`DiscreteSchedule`.
    """

    def __init__(self, num_timesteps: int = 1000, offset: float = 0.008, zero_terminal_snr: bool = False) -> None:
        _check_length(self, num_timesteps)
        if not 0 <= offset < math.inf:
            raise ValueError(f"CosineSchedule: offset must be at least 0 and finite, got {offset}.")
        f = torch.cos((_shares(num_timesteps) + offset) / (1 + offset) * math.pi / 2).square()
        super().__init__(_betas_along(f).clamp(max=0.999), zero_terminal_snr)


class SigmoidSchedule(DiscreteSchedule):
    """``alphas_cumprod`` along a piece of a falling sigmoid, brought to go from 1 to 0, betas at most 0.999.

    Source: Jabri et al. 2023 (arXiv:2212.11972), whose formula is also in Chen 2023, algorithm 1 (arXiv:2301.10972);
    the bound on the betas is that of :class:`CosineSchedule`.

    Args:
        num_timesteps: Number of noise levels.
        start: Where the sigmoid's piece begins, before division by ``tau``.
        end: Where it ends.
        tau: Temperature: smaller is steeper in the middle.
        zero_terminal_snr: As in :class:`DiscreteSchedule`.

    Raises:
        ValueError: If ``start`` is not below ``end`` or ``tau`` not positive, or as :class:`DiscreteSchedule`.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_length(self, num_timesteps)
        if not (start < end and tau > 0):
            raise ValueError(
                f"SigmoidSchedule: start must be below end and tau positive, got start={start}, end={end}, tau={tau}."
            )
        f = torch.sigmoid(-(start + (end - start) * _shares(num_timesteps)) / tau)
        super().__init__(_betas_along(f - f[-1]).clamp(max=0.999), zero_terminal_snr)


def _shares(num_timesteps: int) -> Tensor:
    """From clean data, 0, in even steps to the noisiest time, 1."""
    return torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps


def _betas_along(alphas_cumprod: Tensor) -> Tensor:
    """Betas ``(num_timesteps,)`` that lead from each to the next of ``num_timesteps + 1`` values, up to a factor."""
    return 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]


def _check_length(schedule: NoiseSchedule, num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"{type(schedule).__name__}: num_timesteps must be at least 1, got {num_timesteps}.")
