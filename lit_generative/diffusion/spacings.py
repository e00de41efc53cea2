"""Which times of its schedule a sampler visits."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from typing_extensions import override

from lit_generative.diffusion.schedules import DiscreteSchedule, NoiseSchedule, Time
from lit_generative.recipe import Recorded


class Spacing(Recorded, ABC):
    """A choice of times."""

    @abstractmethod
    def times(self, schedule: NoiseSchedule, num_steps: int) -> list[Time]:
        """Where the network is called: ``num_steps`` falling times, the clean one not among them.

        Raises:
            ValueError: If the schedule has fewer times.
        """


class Linspace(Spacing):
    """Evenly spaced from the noisiest to the least noisy time, both included."""

    @override
    def times(self, schedule: NoiseSchedule, num_steps: int) -> list[Time]:
        return schedule.even_times(num_steps)


class Leading(Spacing):
    """Evenly spaced steps of a discrete schedule, by a whole number and from the clean end: the noisiest are left out.

    What older models were sampled with; :class:`Trailing` starts where training ends.

    Source: Lin et al. 2024, table 2 (arXiv:2305.08891), which names both.

    Args:
        offset: Added to every time; diffusers' ``steps_offset``.

    Raises:
        ValueError: If ``offset`` is negative.
    """

    def __init__(self, offset: int = 0) -> None:
        if offset < 0:
            raise ValueError(f"Leading: offset must be at least 0, got {offset}.")
        self.offset = offset

    @override
    def times(self, schedule: NoiseSchedule, num_steps: int) -> list[Time]:
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"Leading counts the steps of a discrete schedule, and a {type(schedule).__name__} has none. Take "
                "Trailing."
            )
        schedule.even_times(num_steps)  # refuses more than there are
        total = schedule.num_timesteps
        stride = total // num_steps
        if (num_steps - 1) * stride + self.offset >= total:
            raise ValueError(
                f"Leading: offset={self.offset} goes beyond the schedule's {total} noise levels with "
                f"num_steps={num_steps}. Lower one of them."
            )
        return [i * stride + self.offset for i in reversed(range(num_steps))]


class Trailing(Spacing):
    """Evenly spaced from the noisiest time, as if the step after the last were at clean data.

    That is ``1, 1 - 1/n, ..., 1/n`` for a continuous schedule, the usual steps of a flow: none is spent on a last call
    with hardly any noise.

    Source: Lin et al. 2024, table 2 (arXiv:2305.08891).
    """

    @override
    def times(self, schedule: NoiseSchedule, num_steps: int) -> list[Time]:
        schedule.even_times(num_steps)  # refuses more than there are
        if isinstance(schedule, DiscreteSchedule):
            total = schedule.num_timesteps
            return [round(total - i * (total / num_steps)) - 1 for i in range(num_steps)]
        return [1 - i / num_steps for i in range(num_steps)]


class Karras(Spacing):
    """Evenly spaced in ``(sigma / alpha)**(1 / rho)``: more steps where there is little noise.

    Source: Karras et al. 2022, eq. 5 (arXiv:2206.00364), in ``sigma / alpha``.

    Args:
        rho: How much more; 1 spaces ``sigma / alpha`` evenly.
        sigma_min: Last ``sigma / alpha``; None for that of :class:`Linspace`.
        sigma_max: First ``sigma / alpha``; None for that of :class:`Linspace`.

    Raises:
        ValueError: If ``rho`` is not positive, or not ``0 < sigma_min < sigma_max``.
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        if not 0 < rho < math.inf:
            raise ValueError(f"Karras: rho must be positive, got {rho}.")
        _check_range(self, sigma_min, sigma_max)
        self.rho = rho
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @override
    def times(self, schedule: NoiseSchedule, num_steps: int) -> list[Time]:
        return _between(self, schedule, num_steps, self.sigma_min, self.sigma_max, self._ratio)

    def _ratio(self, u: float, high: float, low: float) -> float:
        start, end = high ** (1 / self.rho), low ** (1 / self.rho)
        return (start + u * (end - start)) ** self.rho


class EvenLogSNR(Spacing):
    """Evenly spaced in the logarithm of the signal-to-noise ratio.

    Source: Lu et al. 2022, sec. 3.3 (arXiv:2206.00927).

    Args:
        sigma_min: Last ``sigma / alpha``; None for that of :class:`Linspace`.
        sigma_max: First ``sigma / alpha``; None for that of :class:`Linspace`.

    Raises:
        ValueError: If not ``0 < sigma_min < sigma_max``.
    """

    def __init__(self, sigma_min: float | None = None, sigma_max: float | None = None) -> None:
        _check_range(self, sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @override
    def times(self, schedule: NoiseSchedule, num_steps: int) -> list[Time]:
        return _between(self, schedule, num_steps, self.sigma_min, self.sigma_max, _geometric)


def _geometric(u: float, high: float, low: float) -> float:
    return high ** (1 - u) * low**u


def _check_range(spacing: Spacing, sigma_min: float | None, sigma_max: float | None) -> None:
    low, high = 0.0 if sigma_min is None else sigma_min, float("inf") if sigma_max is None else sigma_max
    if low >= high or (sigma_min is not None and sigma_min <= 0):
        raise ValueError(
            f"{type(spacing).__name__}: needs 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, "
            f"sigma_max={sigma_max}."
        )


def _between(
    spacing: Spacing,
    schedule: NoiseSchedule,
    num_steps: int,
    sigma_min: float | None,
    sigma_max: float | None,
    ratio: Callable[[float, float, float], float],
) -> list[Time]:
    """The times nearest to ``ratio(u, high, low)``, with u evenly from 0 to 1."""
    name, even = f"{type(spacing).__name__}: ", schedule.even_times(num_steps)
    high_end, low_end = _ratio_at(schedule, even[0]), _ratio_at(schedule, even[-1]) if num_steps > 1 else 0.0
    high, low = high_end if sigma_max is None else sigma_max, low_end if sigma_min is None else sigma_min
    if high == math.inf:
        raise ValueError(
            f"{name}the {type(schedule).__name__} starts at pure noise, where sigma / alpha is infinite. Set "
            "sigma_max, or take another spacing."
        )
    if high > high_end * (1 + 1e-9) or low < low_end * (1 - 1e-9):
        raise ValueError(
            f"{name}sigma / alpha of the {type(schedule).__name__} lies in [{low_end:g}, {high_end:g}], got "
            f"sigma_min={sigma_min}, sigma_max={sigma_max}. Leave them out, or keep within."
        )
    inner = [schedule.nearest_time(ratio(i / (num_steps - 1), high, low)) for i in range(1, num_steps - 1)]
    first = even[0] if sigma_max is None else schedule.nearest_time(sigma_max)
    last = even[-1] if sigma_min is None else schedule.nearest_time(sigma_min)
    times = [first, *inner, last] if num_steps > 1 else [first]
    if any(then >= now for now, then in itertools.pairwise(times)):
        raise ValueError(
            f"{name}num_steps={num_steps} are too many, as they fall on {len(set(times))} different times of the "
            f"{type(schedule).__name__}. Lower num_steps, or set sigma_max or sigma_min where its times lie close."
        )
    return times


def _ratio_at(schedule: NoiseSchedule, t: Time) -> float:
    _, alpha, sigma = schedule.level(t)
    return sigma / alpha if alpha > 0 else math.inf
