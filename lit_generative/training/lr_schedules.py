"""Learning-rate schedules with a linear warm-up, counted in optimizer updates.

A config names one beside its optimizer; the module steps it once for each update, with manual optimization too, and
shows :class:`WarmupPlateau` a score at each validation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override


class WarmupSchedule(LRScheduler):
    """Factor ``min(1, (step + 1) / (warmup_steps + 1)) * decay(progress)`` on the optimizer's learning rate.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        warmup_steps: Updates until the full rate is reached; 0 starts with it.
        total_steps: Updates until the decay has ended; the last factor then stays.

    Raises:
        ValueError: If ``warmup_steps`` is negative or ``total_steps`` is not larger.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"{type(self).__name__}: need 0 <= warmup_steps < total_steps, got warmup_steps={warmup_steps}, "
                f"total_steps={total_steps}. Set total_steps to the run's max_steps."
            )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        super().__init__(optimizer)

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Factor after the warm-up, for ``progress`` in ``[0, 1]``."""

    @override
    def get_lr(self) -> list[float]:  # type: ignore[override]
        done = (self.last_epoch - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        factor = _warmup(self.last_epoch, self.warmup_steps) * self.decay(min(1.0, max(0.0, done)))
        return [float(base) * factor for base in self.base_lrs]

    @override
    def state_dict(self) -> dict[str, Any]:
        # The settings belong to the config: a resumed run with a longer total_steps must use it.
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "_step_count": self._step_count}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        _set_rates(self)


class WarmupConstant(WarmupSchedule):
    """Warm-up, then the full rate."""

    @override
    def decay(self, progress: float) -> float:
        return 1.0


class WarmupLinear(WarmupSchedule):
    """Warm-up, then a straight line to zero at ``total_steps``."""

    @override
    def decay(self, progress: float) -> float:
        return 1.0 - progress


class WarmupCosine(WarmupSchedule):
    """Warm-up, then half a cosine to zero at ``total_steps``.

    Source: Loshchilov & Hutter 2017, eq. 5 without restarts (arXiv:1608.03983).
    """

    @override
    def decay(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupPlateau(LRScheduler):
    """Warm-up, then the full rate, multiplied by ``factor`` whenever a score has not improved for a while.

    After the warm-up it does what torch's ``ReduceLROnPlateau`` does at each validation, with one difference: a score
    has improved if it beats the best by more than ``threshold * |best|``, so that negative scores work as well.
    Scores seen during the warm-up count for nothing.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        monitor: Key of the score as it is logged, such as ``"val/fid"``.
        warmup_steps: Updates until the full rate is reached; 0 starts with it.
        mode: ``"min"`` if a lower score is better, ``"max"`` if a higher one is.
        factor: What the rate is multiplied by, in ``(0, 1)``.
        patience: Validations without improvement that are let pass; the next one lowers the rate.
        threshold: Least improvement, relative to the best score.
        cooldown: Validations after a lowering that are not counted against it.
        min_lr: The rate of no group falls below it.

    Raises:
        ValueError: If a count, ``threshold`` or ``min_lr`` is negative, ``factor`` is not in ``(0, 1)``, or ``mode`` is
            unknown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        monitor: str,
        warmup_steps: int = 0,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.5,
        patience: int = 5,
        threshold: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        least_zero = {
            "warmup_steps": warmup_steps,
            "patience": patience,
            "threshold": threshold,
            "cooldown": cooldown,
            "min_lr": min_lr,
        }
        for name, value in least_zero.items():
            if value < 0:
                raise ValueError(f"WarmupPlateau: {name} must be at least 0, got {value}.")
        if not 0 < factor < 1:
            raise ValueError(f"WarmupPlateau: factor must lie between 0 and 1, got {factor}.")
        if mode not in ("min", "max"):
            raise ValueError(f"WarmupPlateau: mode must be 'min' or 'max', got {mode!r}.")
        self.monitor = monitor
        self.warmup_steps = warmup_steps
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.cooldown = cooldown
        self.min_lr = min_lr
        self._plateau = _Plateau()
        super().__init__(optimizer)

    def observe(self, score: SupportsFloat) -> None:
        """Take in the score of one validation, and lower the rate if it is time.

        Args:
            score: The monitored value; NaN is no improvement.
        """
        if self.last_epoch < self.warmup_steps:
            return
        state, value = self._plateau, float(score)
        if self._improves(value):
            state.best, state.bad = value, 0
        else:
            state.bad += 1
        if state.cooling > 0:
            state.cooling, state.bad = state.cooling - 1, 0
        if state.bad > self.patience:
            state.scale, state.cooling, state.bad = state.scale * self.factor, self.cooldown, 0
        _set_rates(self)

    def _improves(self, value: float) -> bool:
        best = self._plateau.best
        if best is None:
            return not math.isnan(value)
        gain = best - value if self.mode == "min" else value - best
        return gain > self.threshold * abs(best)

    @override
    def get_lr(self) -> list[float]:  # type: ignore[override]
        warmup = _warmup(self.last_epoch, self.warmup_steps)
        rates = [float(base) for base in self.base_lrs]
        # A group that starts below min_lr stays where it is.
        return [warmup * min(rate, max(self.min_lr, rate * self._plateau.scale)) for rate in rates]

    @override
    def state_dict(self) -> dict[str, Any]:
        score = {"monitor": self.monitor, "mode": self.mode}
        counts = {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "_step_count": self._step_count}
        return counts | {"score": score, "plateau": dict(vars(self._plateau))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = {key: value for key, value in state_dict.items() if key not in ("score", "plateau")}
        super().load_state_dict(counts)
        self._plateau = _Plateau(**state_dict["plateau"])
        if state_dict["score"] != {"monitor": self.monitor, "mode": self.mode}:
            # The best of another score says nothing of this one; the rate stays as low as it is.
            self._plateau = _Plateau(scale=self._plateau.scale)
        _set_rates(self)


PLATEAUS = (WarmupPlateau, ReduceLROnPlateau)
"""Schedules that watch a score."""


def monitored(schedule: WarmupPlateau | ReduceLROnPlateau) -> str:
    """Key of the score that a plateau watches: ``"val/loss"`` for torch's own class, which does not say."""
    return getattr(schedule, "monitor", "val/loss")


def show_score(schedule: WarmupPlateau | ReduceLROnPlateau, scores: Mapping[str, SupportsFloat]) -> None:
    """Let a plateau take in the score it watches, after a validation; NaN says that it was not measured this time.

    Args:
        schedule: Lowers the rate if it is time.
        scores: Everything that was logged.

    Raises:
        ValueError: If the score is not among ``scores``.
    """
    key = monitored(schedule)
    if key not in scores:
        raise ValueError(
            f"{type(schedule).__name__} monitors {key!r}, which was not logged. Logged: {sorted(scores)}. "
            "Set monitor to one of these, or let a callback log it as often as there is a validation."
        )
    if not math.isnan(scores[key]):
        (schedule.observe if isinstance(schedule, WarmupPlateau) else schedule.step)(scores[key])


@dataclass
class _Plateau:
    """Where a plateau schedule stands."""

    best: float | None = None
    bad: int = 0
    cooling: int = 0
    scale: float = 1.0


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _set_rates(schedule: LRScheduler) -> None:
    """Give the optimizer the rates of the schedule's state, between two updates."""
    schedule._last_lr = [*schedule.get_lr()]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
