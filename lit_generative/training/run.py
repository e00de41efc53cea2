"""What a run says of itself: its seed, and whether it logs now."""

from __future__ import annotations

import os

import lightning as L


def log_now(trainer: L.Trainer) -> bool:
    """Whether the loggers write a row after this batch, which is one of every ``log_every_n_steps`` that stepped."""
    n: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return n > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % n == 0


def global_seed() -> int:
    """The run's seed, as ``seed_everything`` left it for every process; 0 if it was never called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
