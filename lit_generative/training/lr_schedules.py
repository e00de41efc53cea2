"""Learning-rate schedules with a linear warm-up, counted in optimizer updates.

A config names one beside its optimizer; the module steps it once for each update, with manual optimization too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
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
        warmup = min(1.0, (self.last_epoch + 1) / (self.warmup_steps + 1))
        done = (self.last_epoch - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        factor = warmup * self.decay(min(1.0, max(0.0, done)))
        return [float(base) * factor for base in self.base_lrs]

    @override
    def state_dict(self) -> dict[str, Any]:
        # The settings belong to the config: a resumed run with a longer total_steps must use it.
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "_step_count": self._step_count}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._last_lr = [*self.get_lr()]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


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
