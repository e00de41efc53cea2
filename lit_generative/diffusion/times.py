"""Which times of the schedule a batch is trained at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lit_generative.diffusion.schedules import DiscreteSchedule, NoiseSchedule
from lit_generative.recipe import Recorded


class TimeSampling(Recorded, nn.Module, ABC):
    """A distribution of times."""

    def check(self, schedule: NoiseSchedule) -> None:
        """Refuse a schedule without the times to be drawn; every schedule is fine by default.

        Raises:
            ValueError: If it has not.
        """

    @abstractmethod
    def draw(self, num: int, schedule: NoiseSchedule, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Draw times.

        Returns:
            Times ``(num,)``, and factors ``(num,)`` on the losses there that make up for drawing some more often, so
            that the mean loss is that of uniform times; None where the distribution itself is the weighting.
        """

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Learn from the losses ``(N,)`` at ``t``, ``(N,)``, of this process's batch; nothing by default."""


class UniformTimes(TimeSampling):
    """All times alike."""

    @override
    def draw(self, num: int, schedule: NoiseSchedule, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        return schedule.random_times(num, device), None


class LossSecondMoment(TimeSampling):
    """Importance sampling: a time is drawn in proportion to the root of the mean square of its last losses.

    Until each time has a full history, all are drawn alike. The losses are those of all processes, so that these hold
    the same histories. Losses that are not finite are left out.

    Source: Nichol & Dhariwal 2021, sec. 3.3 and eq. 18 (arXiv:2102.09672), who use it for L_vlb; the share of uniform
    draws is that of their code, and keeps a time whose losses were zero from being forgotten.

    Args:
        history: Losses kept for each time.
        uniform_share: Share of the draws that are uniform.
        num_timesteps: Noise levels of the schedule.

    Attributes:
        losses: The last losses, ``(num_timesteps, history)``; the oldest of a row is overwritten first.
        counts: Losses seen at each time, ``(num_timesteps,)`` int64.

    Raises:
        ValueError: If ``history`` or ``num_timesteps`` is below 1, or ``uniform_share`` outside ``[0, 1]``.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, history: int = 10, uniform_share: float = 0.001, num_timesteps: int = 1000) -> None:
        super().__init__()
        if history < 1 or num_timesteps < 1:
            raise ValueError(
                f"LossSecondMoment: history and num_timesteps must be at least 1, got {history} and {num_timesteps}."
            )
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"LossSecondMoment: uniform_share must lie in [0, 1], got {uniform_share}.")
        self.history, self.uniform_share = history, uniform_share
        self.register_buffer("losses", torch.zeros(num_timesteps, history))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Probability of each time, ``(num_timesteps,)``."""
        num = len(self.counts)
        root = self.losses.square().mean(dim=1).sqrt()
        total = root.sum()
        ready = (self.counts.min() >= self.history) & (total > 0)
        learned = self.uniform_share / num + (1 - self.uniform_share) * root / total
        return torch.where(ready, learned, 1 / num)

    @override
    def check(self, schedule: NoiseSchedule) -> None:
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"LossSecondMoment: keeps losses of numbered steps, and {type(schedule).__name__} has none. Take "
                "LogNormalSigma, LogitNormal or UniformTimes."
            )
        if len(self.counts) != schedule.num_timesteps:
            raise ValueError(
                f"LossSecondMoment: keeps losses of {len(self.counts)} noise levels, but the schedule has "
                f"{schedule.num_timesteps}. Set its num_timesteps to that."
            )

    @override
    @torch.no_grad()
    def draw(self, num: int, schedule: NoiseSchedule, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        self.check(schedule)
        probabilities = self.probabilities()
        t = torch.multinomial(probabilities, num, replacement=True)
        return t.to(device), (1 / (len(self.counts) * probabilities[t])).to(device)

    @override
    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor) -> None:
        t, loss = _of_all_processes(t, loss.to(self.losses.dtype))
        spare = len(self.counts)  # one more row, for what is not kept: so nobody waits for the device
        row = torch.where(loss.isfinite(), t, spare)
        row, order = row.sort(stable=True)
        first = torch.searchsorted(row, row)
        after = torch.searchsorted(row, row, right=True)
        place = torch.arange(len(row), device=row.device)
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        column = (counts[row] + place - first) % self.history
        kept = torch.where(after - place > self.history, spare, row)  # a later loss of this batch takes its place
        losses = torch.cat([self.losses, self.losses.new_zeros(1, self.history)])
        losses[kept, column] = loss[order]
        counts.index_add_(0, row, torch.ones_like(row))
        self.losses.copy_(losses[:spare])
        self.counts.copy_(counts[:spare])


class LogNormalSigma(TimeSampling):
    """``ln(sigma / alpha)`` is normal: most training at noise that is neither invisible nor hides everything.

    Beyond the schedule's noisiest and least noisy times it is these.

    Source: Karras et al. 2022, table 1, "noise distribution" (arXiv:2206.00364), whose times are these ratios.

    Args:
        mean: Of ``ln(sigma / alpha)``.
        std: Its standard deviation.

    Raises:
        ValueError: If ``mean`` is not finite, or ``std`` not positive and finite.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        _check_normal(self, mean, std)
        self.mean, self.std = mean, std

    @override
    def draw(self, num: int, schedule: NoiseSchedule, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        ratios = (self.mean + self.std * torch.randn(num, dtype=torch.float64)).exp()
        t = schedule.nearest_times(ratios)
        return (t.float() if t.is_floating_point() else t).to(device), None


class LogitNormal(TimeSampling):
    """Times whose logit is normal: most training in the middle.

    Source: Esser et al. 2024, sec. 3.1 (arXiv:2403.03206).

    Args:
        mean: Of the logit; above 0 for more noise.
        std: Its standard deviation.

    Raises:
        ValueError: If ``mean`` is not finite, or ``std`` not positive and finite.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        _check_normal(self, mean, std)
        self.mean, self.std = mean, std

    @override
    def draw(self, num: int, schedule: NoiseSchedule, device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        u = torch.sigmoid(self.mean + self.std * torch.randn(num, device=device))
        return schedule.spread(u.clamp(max=1 - 2**-24)), None  # float32 rounds to 1 what spread() wants below it


def _check_normal(sampling: TimeSampling, mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"{type(sampling).__name__}: mean must be finite, and std positive and finite, got mean={mean}, std={std}."
        )


def _of_all_processes(t: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """``t`` and ``loss``, each ``(N,)``, of every process, one after the other; ``N`` may differ between them."""
    if not (dist.is_available() and dist.is_initialized()):
        return t, loss
    told = [torch.zeros(1, dtype=torch.int64, device=t.device) for _ in range(dist.get_world_size())]
    dist.all_gather(told, torch.tensor([len(t)], device=t.device))
    sizes: list[int] = torch.cat(told).tolist()
    parts: list[list[Tensor]] = []
    for values in (t, loss):
        padded = torch.cat([values, values.new_zeros(max(sizes) - len(values))])  # collectives want equal shapes
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        parts.append([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    return torch.cat(parts[0]), torch.cat(parts[1])
