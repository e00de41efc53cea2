"""What a run says of itself: its seed, and whether it logs or measures now."""

from __future__ import annotations

import os

import lightning as L


def log_now(trainer: L.Trainer) -> bool:
    """Whether the loggers write a row after this batch, which is one of every ``log_every_n_steps`` that stepped."""
    n: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return n > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % n == 0


def measures_now(trainer: L.Trainer, every_n_steps: int | None) -> bool:
    """Whether this batch ended an update after which something that is due every so many is measured; None: never."""
    due = every_n_steps is not None and trainer.global_step % every_n_steps == 0
    return due and not trainer.fit_loop._should_accumulate()


def global_seed() -> int:
    """The run's seed, as ``seed_everything`` left it for every process; 0 if it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
