"""How often a learning-rate schedule is stepped, in the words of Lightning's ``lr_scheduler`` dictionary."""

from __future__ import annotations

from typing import Literal, NamedTuple

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lit_generative.training.lr_schedules import PLATEAUS

Interval = Literal["step", "epoch"]


class Timing(NamedTuple):
    """When a schedule is stepped."""

    interval: Interval = "step"
    frequency: int = 1

    def due_at(self, count: int) -> bool:
        """Whether it is stepped after the ``count``-th update, epoch, or, for a plateau, validation."""
        return count % self.frequency == 0

    def due_after_update(self, trainer: L.Trainer) -> bool:
        """Whether an update that was just made is followed by a step of the schedule."""
        if self.interval == "step":
            return self.due_at(trainer.global_step)
        # At the epoch's last update, so that the checkpoint written after it holds the new rate.
        return trainer.is_last_batch and self.due_at(trainer.current_epoch + 1)


class Every(LRScheduler):
    """Another schedule, stepped once every ``frequency`` updates or epochs; a plateau's unit is the validation.

    Lightning's dictionary for automatic optimization, which works for optimizers that take turns as well. In YAML::

        generator_scheduler:
          class_path: lit_generative.training.schedule_timing.Every
          init_args:
            schedule: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9}}
            interval: epoch

    It is taken apart when the optimizers are built: the schedule within is what a trainer and a checkpoint hold.

    Args:
        optimizer: The optimizer whose learning rates are scheduled.
        schedule: Builds the schedule.
        interval: What is counted; "epoch" is counted at the last update of each.
        frequency: How many of them pass from one step to the next.
        monitor: Key of the score that a plateau watches, as in ``val/fid``; None leaves the plateau's own.

    Raises:
        ValueError: If ``frequency`` is below 1, ``interval`` unknown, or ``monitor`` or "epoch" is given where it means
            nothing: ``monitor`` for a schedule that watches no score, "epoch" for one that does.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: LRSchedulerCallable,
        interval: Interval = "step",
        frequency: int = 1,
        monitor: str | None = None,
    ) -> None:
        # Not LRScheduler's own: this holds a schedule and is none.
        self.schedule = schedule(optimizer)
        name = type(self.schedule).__name__
        if frequency < 1:
            raise ValueError(f"Every: frequency must be at least 1, got {frequency}.")
        if interval not in ("step", "epoch"):
            raise ValueError(f"Every: interval must be 'step' or 'epoch', got {interval!r}.")
        watches = isinstance(self.schedule, PLATEAUS)
        if watches and interval == "epoch":
            raise ValueError(
                f"Every: {name} is shown its score at each validation, got interval='epoch'. Leave it out, and set the "
                "trainer's check_val_every_n_epoch."
            )
        if monitor is not None and not watches:
            raise ValueError(f"Every: {name} watches no score, got monitor={monitor!r}. Leave it out.")
        if monitor is not None:
            self.schedule.monitor = monitor  # type: ignore[attr-defined]
        self.timing = Timing(interval, frequency)

    @override
    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [float(rate) for rate in self.schedule.get_last_lr()]


def timed(schedule: LRScheduler) -> LRScheduler:
    """The schedule that is to be stepped: what :class:`Every` holds, or itself; :func:`timing_of` tells when."""
    if not isinstance(schedule, Every):
        return schedule
    # Kept with the optimizer, since a schedule's attributes go into checkpoints, and the config's timing shall hold.
    schedule.schedule.optimizer._schedule_timing = schedule.timing  # type: ignore[attr-defined]
    return schedule.schedule


def timing_of(schedule: LRScheduler) -> Timing:
    """When a schedule from :func:`timed` is stepped."""
    return getattr(schedule.optimizer, "_schedule_timing", Timing())
