"""The KL term of a VAE in the course of training: warm-up, once or in cycles, and growing capacity."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lit_generative.types import SupportsCapacity, SupportsKLSchedule


class KLWarmup(L.Callback):
    """Raises the weight of the KL term linearly to its own, so that the code is used before it is paid for.

    The module's own ``kl_weight`` is what it rises to, and what the module has again after training. It depends on the
    step alone, so a resumed run goes on where it was. Validation and test always weigh the KL fully.

    Source: Bowman et al. 2016 (arXiv:1511.06349), Sonderby et al. 2016 (arXiv:1602.02282); in cycles: Fu et al. 2019,
    sec. 3.2 (arXiv:1903.10145).

    Args:
        warmup_steps: Updates until the full weight is reached.
        start: Share of the weight in the beginning.
        cycle_steps: Updates after which it begins anew; None warms up once.

    Raises:
        ValueError: If a number is out of its range, or a cycle shorter than the warm-up.
        TypeError: If the module has no ``kl_weight``.
    """

    def __init__(self, warmup_steps: int, start: float = 0.0, cycle_steps: int | None = None) -> None:
        if warmup_steps < 1:
            raise ValueError(f"KLWarmup: warmup_steps must be at least 1, got {warmup_steps}. Leave it out for none.")
        if not 0 <= start < 1:
            raise ValueError(f"KLWarmup: start is a share in [0, 1), got {start}.")
        if cycle_steps is not None and cycle_steps < warmup_steps:
            raise ValueError(
                f"KLWarmup: a cycle must hold its warm-up, got cycle_steps={cycle_steps} < warmup_steps={warmup_steps}."
            )
        self.warmup_steps, self.start, self.cycle_steps = warmup_steps, start, cycle_steps
        self._full: float | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SupportsKLSchedule):
            raise TypeError(
                f"KLWarmup: {type(pl_module).__name__} has no kl_weight. Use it with a VAE or an AdversarialVAE."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._full = pl_module.kl_weight
        total = _num_updates(trainer)
        if total < self.warmup_steps:
            rank_zero_warn(
                f"KLWarmup: the warm-up of {self.warmup_steps} updates is longer than training, {total:g}: the KL term "
                "never gets its full weight. Lower warmup_steps."
            )

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._full is not None:
            pl_module.kl_weight = self._full * self.weight(trainer.global_step)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._full is not None:
            pl_module.kl_weight, self._full = self._full, None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)  # else a second fit would take the lowered weight for the full one

    def weight(self, step: int) -> float:
        """Share of the KL term's weight at update ``step``, counted from 0."""
        place = step if self.cycle_steps is None else step % self.cycle_steps
        return self.start + (1 - self.start) * min(1.0, place / self.warmup_steps)


class CapacitySchedule(L.Callback):
    """Raises the nats that the objective ``Capacity`` aims at, linearly; then they stay.

    Source: Burgess et al. 2018, sec. 5 (arXiv:1804.03599).

    Args:
        end: Nats at the end.
        num_steps: Updates until they are reached.
        start: Nats in the beginning.

    Raises:
        ValueError: If ``start`` is negative, ``end`` not larger, or ``num_steps`` below 1; or if the module's objective
            does not aim at a capacity.
        TypeError: If the module has no ``capacity``.
    """

    def __init__(self, end: float, num_steps: int, start: float = 0.0) -> None:
        if not 0 <= start < end:
            raise ValueError(f"CapacitySchedule: need 0 <= start < end, got start={start}, end={end}.")
        if num_steps < 1:
            raise ValueError(f"CapacitySchedule: num_steps must be at least 1, got {num_steps}.")
        self.end, self.num_steps, self.start = end, num_steps, start
        self._own: tuple[float | None] | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, SupportsCapacity):
            raise TypeError(
                f"CapacitySchedule: {type(pl_module).__name__} has no capacity. Use it with a VAE and the objective "
                "Capacity."
            )
        if not pl_module.has_capacity:
            raise ValueError(
                "CapacitySchedule: the module's objective aims at no capacity, so nothing would change. Use the "
                "objective Capacity, or leave the schedule out."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._own = (pl_module.capacity,)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.capacity = self.capacity(trainer.global_step)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._own is not None:  # or a fit without the schedule would aim at its last value
            (pl_module.capacity,), self._own = self._own, None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def capacity(self, step: int) -> float:
        """Nats aimed at in update ``step``, counted from 0."""
        return self.start + (self.end - self.start) * min(1.0, step / self.num_steps)


def _num_updates(trainer: L.Trainer) -> float:
    """Of the whole training, by steps or by epochs; infinite if it has no end."""
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return by_steps
    batches = trainer.max_epochs * trainer.num_training_batches
    return min(by_steps, batches // trainer.accumulate_grad_batches if math.isfinite(batches) else math.inf)
