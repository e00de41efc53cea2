"""Noise schedules whose time is a number in ``[0, 1]``."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from lit_generative.diffusion.schedules import Level, NoiseSchedule, Time


class ContinuousSchedule(NoiseSchedule):
    """Times in ``[t_min, 1]``, noisier with t; 0 means clean data.

    Attributes:
        t_min: The least noisy time; a power of 2, so that float32 holds it exactly.
    """

    clean: Time = 0.0
    t_min: float = 2.0**-16

    @abstractmethod
    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at times in ``[t_min, 1]``, of the shape and type of ``t``; nothing is checked."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """Where ``sigma / alpha`` is ``ratio``, above 0, of its shape; it may lie outside ``[t_min, 1]``."""

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        is_clean = t == self.clean
        if t.device.type == "cpu" and not (fits := is_clean | ((t >= self.t_min) & (t <= 1))).all():
            raise self._outside(t[~fits][0].item())
        alpha, sigma = self.factors(t.float())
        return torch.where(is_clean, 1.0, alpha), torch.where(is_clean, 0.0, sigma)

    @override
    def level(self, t: Time) -> Level:
        if t == self.clean:
            return Level(self.clean, 1.0, 0.0)
        if not self.t_min <= t <= 1:
            raise self._outside(t)
        alpha, sigma = self.factors(torch.tensor(t, dtype=torch.float64))
        return Level(float(t), alpha.item(), sigma.item())

    @override
    def random_times(self, num: int, device: torch.device | str) -> Tensor:
        return self.spread(torch.rand(num, device=device, dtype=torch.float32))

    @override
    def spread(self, u: Tensor) -> Tensor:
        return (self.t_min + (1 - self.t_min) * u).float()

    @override
    def even_times(self, num: int) -> list[Time]:
        return list(torch.linspace(1, self.t_min, num, dtype=torch.float64).tolist())

    @override
    def nearest_times(self, ratios: Tensor) -> Tensor:
        return self.time_of(ratios).clamp(self.t_min, 1.0)

    def _outside(self, t: Time) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: times must lie in [{self.t_min:g}, 1], or be 0 for clean data, got {t:g}."
        )

    def _share(self, t: Tensor) -> Tensor:
        """How far ``t`` lies on the way from ``t_min`` to 1."""
        return (t - self.t_min) / (1 - self.t_min)

    def _time_at(self, share: Tensor) -> Tensor:
        """The times that lie so far on that way."""
        return self.t_min + share * (1 - self.t_min)


class CosineLogSNR(ContinuousSchedule):
    """Variance preserving, ``alpha`` along a cosine: ``log_snr = -2 log tan(angle) + shift``.

    The angle grows evenly with t, not from 0 to ``pi / 2`` but so that ``log_snr`` stays finite, as in the source.

    Source: Hoogeboom et al. 2023, sec. 3.1 and App. A (arXiv:2301.11093).

    Args:
        log_snr_min: At ``t = 1``, before the shift.
        log_snr_max: At ``t_min``, before the shift.
        shift: Added everywhere. ``2 * log(64 / d)`` gives images of width and height d the noise that the cosine
            gives those of 64 pixels.

    Raises:
        ValueError: If ``log_snr_min`` is not below ``log_snr_max``, or a number is not finite.
    """

    def __init__(self, log_snr_min: float = -15.0, log_snr_max: float = 15.0, shift: float = 0.0) -> None:
        super().__init__()
        _check_range(self, log_snr_min, log_snr_max)
        if not math.isfinite(shift):
            raise ValueError(f"CosineLogSNR: shift must be finite, got {shift}.")
        self.first = math.atan(math.exp(-log_snr_max / 2))
        self.last_left = math.atan(math.exp(log_snr_min / 2))  # what is left from the last angle to pi / 2
        self.range = math.pi / 2 - self.last_left - self.first
        self.noise_scale = math.exp(-shift / 2)

    @override
    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # alpha from the angle's complement: in float32 the cosine of an angle near pi / 2 has no digits left.
        alpha = (self.last_left + self.range * (1 - t) / (1 - self.t_min)).sin()
        sigma = self.noise_scale * (self.first + self.range * self._share(t)).sin()
        norm = torch.hypot(alpha, sigma)  # 1, but for the shift
        return alpha / norm, sigma / norm

    @override
    def time_of(self, ratio: Tensor) -> Tensor:
        return self._time_at(((ratio / self.noise_scale).atan() - self.first) / self.range)


class LinearLogSNR(ContinuousSchedule):
    """Variance preserving, ``log_snr`` on a straight line.

    Source: Kingma et al. 2021 (arXiv:2107.00630), where the variational diffusion model learns both ends, from these
    values on.

    Args:
        log_snr_min: At ``t = 1``.
        log_snr_max: At ``t_min``.

    Raises:
        ValueError: If ``log_snr_min`` is not below ``log_snr_max``, or one is not finite.
    """

    def __init__(self, log_snr_min: float = -5.0, log_snr_max: float = 13.3) -> None:
        super().__init__()
        _check_range(self, log_snr_min, log_snr_max)
        self.log_snr_min, self.log_snr_max = log_snr_min, log_snr_max

    @override
    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr_max + (self.log_snr_min - self.log_snr_max) * self._share(t)
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    @override
    def time_of(self, ratio: Tensor) -> Tensor:
        return self._time_at((self.log_snr_max + 2 * ratio.log()) / (self.log_snr_max - self.log_snr_min))


class RectifiedFlow(ContinuousSchedule):
    """A straight line from data to noise: ``alpha = 1 - t``, ``sigma = t``; at ``t = 1`` nothing is left of the image.

    Source: Liu et al. 2022, eq. 1 (arXiv:2209.03003), and Lipman et al. 2023, sec. 4.1 (arXiv:2210.02747), whose times
    run the other way. Shift: Esser et al. 2024, eq. 23 (arXiv:2403.03206).

    Args:
        shift: The source's ``sqrt(m / n)``: puts ``shift * t / (1 + (shift - 1) * t)`` in the place of t, which is
            noisier if above 1. The network still sees t.

    Raises:
        ValueError: If ``shift`` is not positive and finite.
    """

    def __init__(self, shift: float = 1.0) -> None:
        super().__init__()
        if not 0 < shift < math.inf:
            raise ValueError(f"RectifiedFlow: shift must be positive and finite, got {shift}. 1 is no shift.")
        self.shift = shift

    @override
    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        total = 1 + (self.shift - 1) * t
        return (1 - t) / total, self.shift * t / total

    @override
    def time_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + self.shift / ratio)


class EDMSchedule(ContinuousSchedule):
    """The image stays as it is, and noise is added: ``alpha = 1``, ``sigma`` geometric in t.

    Source: Karras et al. 2022, table 1 (arXiv:2206.00364), where ``sigma`` itself is the time; here t is the
    position of ``log(sigma)`` between both ends, which gives networks times in ``[0, 1]``.

    Args:
        sigma_min: At ``t_min``.
        sigma_max: At ``t = 1``, where samplers start.

    Raises:
        ValueError: If not ``0 < sigma_min < sigma_max < inf``.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"EDMSchedule: needs 0 < sigma_min < sigma_max < inf, got sigma_min={sigma_min}, sigma_max={sigma_max}."
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.initial_scale = sigma_max

    @override
    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        share = self._share(t)
        return torch.ones_like(t), self.sigma_min ** (1 - share) * self.sigma_max**share

    @override
    def time_of(self, ratio: Tensor) -> Tensor:
        return self._time_at((ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min))


def _check_range(schedule: ContinuousSchedule, log_snr_min: float, log_snr_max: float) -> None:
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(
            f"{type(schedule).__name__}: log_snr_min must be below log_snr_max and both finite, got {log_snr_min} and "
            f"{log_snr_max}."
        )
